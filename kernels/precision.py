"""Matrix products of plain PyTorch with fp32's full precision, whatever the process-wide settings allow.

``torch.set_float32_matmul_precision("high")``, ``allow_tf32`` and NVIDIA's ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``
reduce fp32 products to 10 bits of mantissa, "medium" to 7 bits on a CPU: a logit of 100 is then off by 0.1 or 0.8.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Computes fp32 products in fp32, without autocast; restores PyTorch's settings, also after an error."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in backends]
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:  # set to different values by PyTorch's older and newer functions
        general = None
    without_autocast = (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type)
        else contextlib.nullcontext()
    )
    with without_autocast:
        if general == "highest" and set(saved) <= {"none", "ieee"}:
            yield
            return
        # The older function sets both and comes first: PyTorch refuses products if the two disagree.
        torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            if general is not None:
                torch.set_float32_matmul_precision(general)
            for backend, precision in zip(backends, saved):
                backend.fp32_precision = precision


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of ``(M, D)`` and ``(N, D)`` in their dtype's full precision, also in the backward."""
    return _Product.apply(left, right)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    # The backward runs after the forward's context has ended and enters its own.
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with full_fp32(left.device):
            return left @ right.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        left, right = ctx.saved_tensors
        for_left, for_right = ctx.needs_input_grad
        return (
            product(gradient, right.T) if for_left else None,
            product(gradient.T, left.T) if for_right else None,
        )
