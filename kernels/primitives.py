"""Primitives of the Triton kernels: exact arithmetic on blocks, memory allocation and launch.

Kernels compute in ``ACC``: fp32, or fp64 for fp64 features, which only the interpreter runs.

Names in kernels: ``p_`` is a block of pointers, ``o_`` a block of offsets (indices of rows or columns), ``m_`` a
mask, ``b_`` a block of values; a bare name is the first address of a tensor, a tuple of such addresses, or a
scalar. Capitals are sizes of the mathematics (``B``, ``N``, ``D``) and compile-time constants.

Kernels take tensors and constants in NamedTuples, but integers one by one: Triton ignores ``do_not_specialize``
inside a tuple, and would compile again for a batch of 1 or one that is not a multiple of 16. ``logit_scale`` and
``upstream``, which the caller may pass at any alignment, stay outside for the same reason.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes with bf16 as if its bits were an integer, and truncates where a GPU rounds.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

# F.normalize divides by the norm, but never by less than this.
CLAMP = tl.constexpr(1e-12)
# Power of two for rows below the clamp: 2 ** -40 is just below it, so that their factor is near 1 as well.
CLAMPED_POWER = tl.constexpr(2.0**-40)

# Row kernels hold complete rows in registers: this many elements of one matrix at a time.
_ELEMENTS = 2048
MAX_WIDTH = 2048
# Elements of 4 or 8 bytes to which buffers inside of one tensor are rounded up.
_ALIGNMENT = 32

# Set explicitly because Triton's default differs between versions, and with it the last bits of every result. A
# launch may have others: kernels whose bits are those of plain PyTorch fuse nothing.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


class RowBlock(NamedTuple):
    """Block shape of a kernel that works on complete rows."""

    ROWS: int
    WIDTH: int


def row_block(width: int) -> RowBlock:
    """Block shape for rows of ``width`` elements."""
    block = max(512, 1 << (width - 1).bit_length())
    return RowBlock(_ELEMENTS // block, block)


def divide_up(count: int, size: int) -> int:
    """Number of blocks of ``size`` that cover ``count``."""
    return -(-count // size)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


def aligned(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of buffers that lie one after another in a tensor and each begin at a multiple of 128 bytes."""
    return tuple(round_up(size, _ALIGNMENT) for size in sizes)


def compute_dtype(features: torch.dtype) -> torch.dtype:
    """The dtype in which losses of features of this dtype are computed and returned."""
    return torch.float64 if features == torch.float64 else torch.float32


def acc_dtype(features: torch.dtype) -> Any:
    """:func:`compute_dtype` as Triton's dtype, the kernels' ``ACC``."""
    return tl.float64 if features == torch.float64 else tl.float32


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory; every output and all scratch memory of the kernels comes from here."""
    return torch.empty(shape, dtype=dtype, device=device)


def dense(tensor: Tensor) -> Tensor:
    """The tensor as the kernels read it: contiguous and aligned to 16 bytes, copied only if it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


# Compiled kernels by everything that Triton specializes them for.
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Runs ``programs`` programs of a kernel on the device of its first argument, a tensor or a tuple of some.

    ``arguments`` are all that are not compile-time constants; tuples hold tensors only. Triton binds arguments and
    looks up the compiled kernel at each launch, which takes most of its host time; here launches after the first
    find it by what Triton specializes for: dtypes, alignments, kinds of integers, and constants.
    """
    options = COMPILER_OPTIONS | options
    if INTERPRETED:
        kernel[(programs,)](*arguments, **options)
        return
    first = arguments[0]
    device = (first if isinstance(first, Tensor) else first[0]).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch_compiled(kernel, device.index, programs, arguments, options)
    else:
        _launch_compiled(kernel, device.index, programs, arguments, options)


def _launch_compiled(
    kernel: Any, device: int | None, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    key: list[Any] = [kernel.fn, device, *options.values()]
    for argument, parameter in zip(arguments, kernel.params):
        if isinstance(argument, Tensor):
            is_aligned = parameter.do_not_specialize_on_alignment or argument.data_ptr() % 16 == 0
            key += argument.dtype, is_aligned
        elif isinstance(argument, tuple):
            for tensor in argument:
                key += tensor.dtype, tensor.data_ptr() % 16 == 0
        elif type(argument) is int:
            key.append(-(2**31) <= argument < 2**31)
            if not parameter.do_not_specialize:
                key += argument == 1, argument % 16 == 0
        else:
            key += type(argument), argument
    compiled = _compiled.get(hashable := tuple(key))
    if compiled is None:
        _compiled[hashable] = kernel[(programs,)](*arguments, **options)
    else:
        constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
        compiled[(programs, 1, 1)](*arguments, *constants)


@triton.jit
def divide(b_dividend, b_divisor):
    """``dividend / divisor``, correctly rounded.

    Triton's ``/`` may be off by two units in the last place, and differences of unit rows are a thousand units
    long.
    """
    if b_dividend.dtype == tl.float64:
        return b_dividend / b_divisor
    else:
        return tl.div_rn(b_dividend, b_divisor)


@triton.jit
def square_root(b_x):
    """``sqrt(x)``, correctly rounded."""
    if b_x.dtype == tl.float64:
        return tl.sqrt(b_x)
    else:
        return tl.sqrt_rn(b_x)


@triton.jit
def row_norms(b_x):
    """``|x_i| = sqrt(sum_d x_id^2)`` of each row, ``(R, D) -> (R,)``."""
    return square_root(tl.sum(b_x * b_x, axis=1))


@triton.jit
def clamp_norms(b_norm):
    """``max(|x_i|, 1e-12)``, the divisor of F.normalize; unlike ``tl.maximum`` it propagates NaN."""
    return tl.where(b_norm < CLAMP, tl.full(b_norm.shape, CLAMP, b_norm.dtype), b_norm)


@triton.jit
def power_of_two(b_x):
    """``2^floor(log2 x)`` of ``x >= 0``, from its exponent bits; infinity and NaN give infinity."""
    if b_x.dtype == tl.float64:
        return (b_x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    else:
        return (b_x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def log1p(b_x):
    """``log(1 + x)`` of ``x >= 0``, accurate near 0: the rounding error of ``1 + x`` cancels in the quotient."""
    b_y = 1.0 + b_x
    return tl.where(b_y == 1.0, b_x, tl.log(b_y) * (b_x / tl.where(b_y == 1.0, 1.0, b_y - 1.0)))


@triton.jit
def round_to(b_x, dtype: tl.constexpr):
    """``x`` as ``dtype``, rounded to nearest, ties to even, also under the interpreter."""
    if _INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.float32).to(tl.int32, bitcast=True)
        b_bits = tl.where(b_x == b_x, (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -0x10000, b_bits)
        b_x = b_bits.to(tl.float32, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def dot(b_left, b_right, b_acc):
    """``acc + left @ right``: products of half precision are exact, fp32 products keep fp32's precision."""
    if _INTERPRETED and b_left.dtype == tl.bfloat16:
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_acc, input_precision="tf32x3", out_dtype=b_acc.dtype)


@triton.jit
def row_products(
    left, right, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ACC: tl.constexpr
):
    """``left @ right.T`` of ``(ROWS, width)`` and ``(COLUMNS, width)``.

    ``width`` is a multiple of ``DEPTH``; nothing is masked, so that all rows must exist.
    """
    o_depth = tl.arange(0, DEPTH)
    p_left = left + tl.arange(0, ROWS)[:, None] * width + o_depth[None, :]
    p_right = right + tl.arange(0, COLUMNS)[None, :] * width + o_depth[:, None]
    b_acc = tl.zeros([ROWS, COLUMNS], ACC)
    for _ in range(0, width, DEPTH):
        b_acc = dot(tl.load(p_left), tl.load(p_right), b_acc)
        p_left += DEPTH
        p_right += DEPTH
    return b_acc


@triton.jit
def diagonal_products(
    left, right, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ACC: tl.constexpr
):
    """``left_i . right_i`` of ``(ROWS, width)`` each: diagonals of the same tiles as :func:`row_products`."""
    b_diagonal = tl.zeros([ROWS], ACC)
    for offset in range(0, ROWS, COLUMNS):
        b_product = row_products(left, right + offset * width, width, ROWS, COLUMNS, DEPTH, ACC)
        m_diagonal = offset + tl.arange(0, COLUMNS)[None, :] == tl.arange(0, ROWS)[:, None]
        b_diagonal += tl.sum(tl.where(m_diagonal, b_product, 0.0), axis=1)
    return b_diagonal


@triton.jit
def is_last(ticket, programs):
    """Whether this program is the last of ``programs`` to call; it then sees the stores of all others.

    The counter is an integer: which program is last varies from run to run, but not what it reads and adds.
    """
    tl.debug_barrier()  # the stores of all threads come before the release by one of them
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    return last
