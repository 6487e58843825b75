"""Choice of the backend that computes a loss: the Triton kernels, or the plain PyTorch of ``naive``."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    from dive_fast.kernels import primitives
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    primitives = None  # type: ignore[assignment]

Backend = Literal["auto", "triton", "torch"]


def uses_triton(
    backend: Backend, features: Tensor, constants: dict[str, Tensor] | None = None, *, any_width: bool = False
) -> bool:
    """Whether to run the Triton kernels on these features.

    "auto" chooses them where they can run: on CUDA, or on any device under ``TRITON_INTERPRET=1``. "triton" also
    accepts fake tensors of any device, which give the kernels' shapes and memory without a GPU.

    Args:
        constants: tensors that get no gradient from the kernels, by argument name.
        any_width: the kernels do not keep complete rows in registers.

    Raises:
        ValueError: the backend is unknown, or it is "triton" and the kernels cannot run; the message says why.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "torch":
        return False
    is_simulated = backend == "triton" and isinstance(features, FakeTensor)
    obstacle = _find_obstacle(features, constants or {}, is_simulated, any_width)
    if obstacle is not None and backend == "triton":
        raise ValueError(f'backend: "triton" cannot run: {obstacle}; use "auto" or "torch"')
    return obstacle is None


def _find_obstacle(
    features: Tensor, constants: dict[str, Tensor], is_simulated: bool, any_width: bool
) -> str | None:
    """The reason why the kernels cannot run on these tensors, or None."""
    if primitives is None:
        return "the package triton is not installed"
    if not primitives.INTERPRETED and not is_simulated:
        if features.device.type != "cuda":
            return f"features are on {features.device.type}, not on CUDA, and TRITON_INTERPRET=1 is not set"
        if features.dtype == torch.float64:
            return "features are fp64, which only the interpreter (TRITON_INTERPRET=1) supports"
        if not _has_tensor_cores(features.device):
            return f"{features.device} is older than compute capability 8.0"
    if features.shape[-1] > primitives.MAX_WIDTH and not any_width:
        return f"embeddings of {features.shape[-1]} elements are wider than {primitives.MAX_WIDTH}"
    if torch.is_grad_enabled():
        for name, tensor in constants.items():
            if tensor.requires_grad:
                return f"{name} requires a gradient, which the kernels do not compute"
    return None


@torch.compiler.assume_constant_result
def _has_tensor_cores(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
