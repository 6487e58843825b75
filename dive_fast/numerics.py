"""PyTorch's process-wide precision switches, set in one place, so that fp32 products are fp32 in every container.

NVIDIA's containers enable TF32 by ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``, and PyTorch itself enables it for cuDNN's
convolutions. Its ten bits of mantissa lose difference vectors of 1e-3 (docs/precision.md).
"""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["configure", "full_fp32", "state"]


def configure() -> None:
    """Sets the switches for this process; every command calls this before it computes anything.

    - TF32 is off, in cuBLAS and in cuDNN: fp32 means fp32.
    - cuBLAS keeps partial sums of fp16 and bf16 products in fp32, also where it splits the inner dimension.
    - cuDNN's attention is off: it builds a plan for each new shape of text, and its backward is not deterministic.
      It is disabled for the process and not around a forward, since recomputed blocks run outside of the forward.
    """
    # Unlike an assignment to allow_tf32, this also resets the effect of TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def full_fp32(enabled: bool = True) -> Iterator[None]:
    """Disables TF32 in products and convolutions inside the block; restores both flags afterwards.

    For code that may run in a process without :func:`configure`, such as that of a library's user.
    """
    if not enabled:
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def state() -> dict[str, bool]:
    """The current switches, as JSON values for an identity: they determine the bits of a result."""
    return {
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "fp16_reduced_precision_reduction": bool(
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
        "bf16_reduced_precision_reduction": bool(
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }
