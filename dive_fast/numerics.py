"""PyTorch's process-wide switches of precision, set in one place: an fp32 product is fp32 in every container.

NVIDIA's containers turn TF32 on by ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``, and PyTorch itself has it on for cuDNN's
convolutions: ten bits of mantissa, in which difference vectors of 1e-3 are lost (docs/precision.md).
"""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["configure", "full_fp32", "state"]


def configure() -> None:
    """Sets the switches for this process; every command calls it before it computes anything.

    - TF32 is off, in cuBLAS and in cuDNN: fp32 means fp32.
    - cuBLAS keeps partial sums of fp16 and bf16 products in fp32, also where it splits the inner dimension.
    - cuDNN's attention is off: it builds a plan for each new shape of text, and its backward is not deterministic.
      The choice is made for the process and not around a forward, since recomputed blocks run outside of it.
    """
    # Unlike an assignment to allow_tf32, this also resets what TORCH_ALLOW_TF32_CUBLAS_OVERRIDE has set.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def full_fp32(enabled: bool = True) -> Iterator[None]:
    """Inside, fp32 products and convolutions use no TF32; afterwards both flags are what they were.

    For code that runs in a process which nobody has configured, such as a library's user's.
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
    """The switches as they are now: what decides the bits of a result, as JSON values for an identity."""
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
