"""What the Triton kernels share: exact arithmetic on blocks, allocation, launch.

Arithmetic is that of ``ACC``: fp32, or fp64 for fp64 features, which only the interpreter runs.
"""

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes with bf16 as if its bits were an integer, and cuts bits off where a GPU rounds.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Below this norm F.normalize divides by it in place of the norm.
CLAMP = tl.constexpr(1e-12)
# The clamped rows' power of two: 2 ** -40 is just below the clamp, so that their factor is near 1 as well.
CLAMPED_POWER = tl.constexpr(2.0**-40)

# Row kernels hold whole rows in registers: so many elements of one matrix at a time.
_ELEMENTS = 2048
MAX_WIDTH = 2048

# Said aloud because Triton's default differs between versions, and with it the last bits of every result.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def row_block(width: int) -> dict[str, int]:
    """Block shape of a kernel that works on whole rows of ``width``."""
    block = max(512, triton.next_power_of_2(width))
    return {"ROWS": _ELEMENTS // block, "WIDTH": block}


def round_up(count: int, multiple: int) -> int:
    """The next multiple of ``multiple``."""
    return math.ceil(count / multiple) * multiple


def computing_dtype(features: torch.dtype) -> torch.dtype:
    """The dtype that losses of features of this dtype are computed and returned in."""
    return torch.float64 if features == torch.float64 else torch.float32


def acc(features: torch.dtype) -> Any:
    """The same, as the kernels' ``ACC``."""
    return tl.float64 if features == torch.float64 else tl.float32


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every output and all scratch memory of the kernels comes from here, unwritten."""
    return torch.empty(shape, dtype=dtype, device=device)


def dense(tensor: Tensor) -> Tensor:
    """The tensor as the kernels read it: row after row, from a multiple of 16 bytes on; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Runs ``programs`` programs of a kernel on the device of its first argument."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **options, **COMPILER_OPTIONS)


@triton.jit
def divide(dividend, divisor):
    """Correctly rounded: ``/`` may be off by two units, and differences of unit rows are a thousand units long."""
    if dividend.dtype == tl.float64:
        return dividend / divisor
    else:
        return tl.div_rn(dividend, divisor)


@triton.jit
def square_root(x):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def norms(rows):
    """Lengths of rows, ``(R, D) -> (R,)``."""
    return square_root(tl.sum(rows * rows, axis=1))


@triton.jit
def clamped(norm):
    """What F.normalize divides by; unlike ``tl.maximum`` it lets a NaN through."""
    return tl.where(norm < CLAMP, tl.full(norm.shape, CLAMP, norm.dtype), norm)


@triton.jit
def power_of_two(x):
    """The largest power of two not above ``x``, from its exponent bits; infinity and NaN give infinity."""
    if x.dtype == tl.float64:
        return (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate near 0: what 1 + x rounds away divides out again."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """To ``dtype``, to the nearest, ties to even, also under the interpreter."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000, bits)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(left, right, acc):
    """``acc + left @ right``: products of half precision are exact, fp32 ones keep fp32's precision."""
    if _INTERPRETED and left.dtype == tl.bfloat16:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="tf32x3", out_dtype=acc.dtype)


@triton.jit
def split_dot(weights, right, acc):
    """``acc + weights @ right`` where ``right`` may be half precision and the weights are not.

    They are cut into two halves there, 22 bits in fp16 and 16 in bf16, in place of 11 and 8 in one.
    """
    if right.dtype.primitive_bitwidth == 16:
        high = weights.to(right.dtype)
        low = (weights - high.to(weights.dtype)).to(right.dtype)
        acc = dot(high, right, acc)
        return dot(low, right, acc)
    else:
        return dot(weights, right, acc)


@triton.jit
def products(
    left, right, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ACC: tl.constexpr
):
    """``left @ right.T`` of ``(ROWS, width)`` and ``(COLUMNS, width)``; a multiple of DEPTH wide, no bounds."""
    depth = tl.arange(0, DEPTH)
    p_left = left + tl.arange(0, ROWS)[:, None] * width + depth[None, :]
    p_right = right + tl.arange(0, COLUMNS)[None, :] * width + depth[:, None]
    acc = tl.zeros([ROWS, COLUMNS], ACC)
    for _ in range(0, width, DEPTH):
        acc = dot(tl.load(p_left), tl.load(p_right), acc)
        p_left += DEPTH
        p_right += DEPTH
    return acc


@triton.jit
def is_last(ticket, programs):
    """Whether this program is the last of ``programs`` to ask; it then sees what the others have stored.

    The counter is an integer: who is last varies from run to run, what the last one reads and adds does not.
    """
    tl.debug_barrier()  # all threads' stores come before the one thread's release
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    return last
