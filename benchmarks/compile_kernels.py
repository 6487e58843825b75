"""Compile every kernel variant that can be launched, without a GPU, and report its registers and shared memory.

    python benchmarks/compile_kernels.py                   # for sm_90, table in benchmarks/results/kernels_sm90.md
    python benchmarks/compile_kernels.py --capability 80 90 100 --output build
    python benchmarks/compile_kernels.py --sample          # some variants of each kernel, compared with the table

The real host code runs on meta tensors while its launches are recorded, so that exactly the variants that would
be launched are compiled. Too much shared memory, or on Hopper a spilled register, ends the command with an error
and no table.

A digest of code and variants in each row of the table shows whether the row is up to date. If so, compiling again
would give the same: ``--sample`` then compiles as few variants as cover each value of each constant and type.
"""

import argparse
import ast
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import unittest.mock
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from dive_fast.kernels import (
    activation,
    attack_steps,
    column_sums,
    contrastive,
    deviations,
    difference,
    distillation,
    joint_step,
    layer_norm,
    moving_average,
    normalise,
    packed_qkv,
    primitives,
    volume,
)

# Bytes of shared memory for one program, by compute capability (CUDA programming guide, technical specifications).
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
RESULTS = Path(__file__).parent / "results"
RESOURCES = "registers", "spilled_bytes", "shared"

# Each power of two to which rows are padded, with rows that are multiples of 16 bytes and without.
WIDTHS = (70, 512, 768, 770, 1270, 1280)
# Batches for every tile of the contrastive loss, with one split of the columns and with several.
BATCHES = (1, 256, 1024, 4096, 8192)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Weights of the feature, relational, interactive and cross terms: TRACER's, its feature term alone, and CaRot's.
DISTILLATIONS = ((2000.0, 1.0, 1.0, 1.0), (2000.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0))

# Residual streams, from the text tower of ViT-B to ViT-bigG, and a width that is not a multiple of 16 bytes.
TOWER_WIDTHS = (512, 768, 1024, 1280, 1664, 70)
MLP_WIDTHS = (2048, 3072, 4096, 70)
HEADS = ((12, 64), (16, 80), (5, 14))
TOKENS = 788

# Sums of DiGraP, with the current deviations, and by rows; of SPD before and after a step; of FTP; all of them.
PRODUCTS = ("gd dd gg gp", "gd dd gg", "gd dd gg gp pp", "gd dd", "dd", "d1 gp dd", "gd dd gg gp pp d1")


class Variant(NamedTuple):
    """One compilation: the kernel, its argument types, constants, aligned arguments and the compiler's options.

    A type is Triton's name of it, or a NamedTuple of such names. An aligned argument is given by its position,
    followed by the position within its tuple if it is in one.
    """

    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, int], ...]


LOSSES = (contrastive, difference, distillation, joint_step, volume)
LAYERS = (activation, attack_steps, layer_norm, normalise, packed_qkv)
MODULES = (*LOSSES, *LAYERS, column_sums, deviations, moving_average)
KERNELS = {name: kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")}
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
TYPES |= {torch.int64: "*i64", torch.float64: "*fp64", torch.uint8: "*u8"}


def variants() -> list[Variant]:
    """Every distinct launch over batches, widths, dtypes and options."""
    recorded: dict[Variant, None] = {}

    def record(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        options = primitives.COMPILER_OPTIONS | options
        recorded[_variant(kernel, arguments, options)] = None

    with unittest.mock.patch.object(primitives, "launch", record):
        for rows, width, dtype in itertools.product(BATCHES, WIDTHS, DTYPES):
            _launch_all(rows, width, dtype)
        for dtype in DTYPES:
            _launch_activation(dtype)
            _launch_packed(dtype)
            _launch_normalise(dtype)
        _launch_attack_steps()
        # Images have one dtype; the residual stream of texts is fp32 under autocast.
        for stream, dtype in itertools.product(DTYPES, DTYPES):
            if stream in (dtype, torch.float32):
                _launch_layer_norm(stream, dtype)
        for offset in (0, 1):
            _launch_moving_average(offset)
            for length in (768, 80_000):
                _launch_deviations(offset, length)
    return list(recorded)


def _launch_all(rows: int, width: int, dtype: torch.dtype) -> None:
    """Launches all losses, forward and backward."""

    def features() -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device="meta")

    image, text, scale = features(), features(), torch.empty((), device="meta")
    teacher, average_vector = features().float(), torch.empty(width, device="meta")
    upstream = torch.empty((), device="meta")
    reference = image, text, teacher, teacher
    _, *saved = contrastive.launch_forward(image, text, scale, "")
    sizes = rows, rows, 0, width
    contrastive.launch_backward(upstream, scale, *saved, *sizes)
    for mean_gradient in (True, False):
        options = 0.99, 1.0, 1.0, mean_gradient
        _, _, state = difference.launch_forward(*reference, average_vector, *options, "")
        difference.launch_backward(upstream, *reference, state, *options)
        _, _, *saved = joint_step.launch_forward(
            image, text, scale, *reference, average_vector, 1000.0, *options, ""
        )
        joint_step.launch_backward(upstream, scale, *saved, *reference, *sizes, 1000.0, *options)
    for weights in DISTILLATIONS if width == 512 else DISTILLATIONS[:1]:  # their widths differ in the rows alone
        _, _, *saved = distillation.launch_forward(image, text, scale, teacher, teacher, scale, *weights, "")
        distillation.launch_backward(upstream, scale, scale, *saved, *sizes, True, dtype, *weights)
    volume.launch_backward(upstream, image, image, image)
    volume.launch_forward(image, image, image)


def _launch_activation(dtype: torch.dtype) -> None:
    for width, kind in itertools.product(MLP_WIDTHS, ("quick_gelu", "gelu", "gelu_tanh")):
        x, bias = torch.empty(TOKENS, width, dtype=dtype, device="meta"), torch.empty(width, device="meta")
        activation.launch_forward(x, bias, kind)
        for bias_gradient in (True, False):
            activation.launch_backward(x, x, bias, kind, bias_gradient)


def _launch_packed(dtype: torch.dtype) -> None:
    for (heads, width), parts in itertools.product(HEADS, (2, 3)):
        gradient = torch.empty(4, TOKENS // 4, heads, width, dtype=dtype, device="meta").transpose(1, 2)
        packed_qkv.launch_backward([gradient] * parts, torch.float32)


def _launch_normalise(dtype: torch.dtype) -> None:
    pixels = torch.empty(2, 224, 224, 3, dtype=torch.uint8, device="meta")
    for channels_last in (False, True):
        normalise.launch_forward(pixels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), dtype, channels_last)


def _launch_attack_steps() -> None:
    """Images whose values are a multiple of 16 in number, and others."""
    for side in (224, 27):
        images, numbers = torch.empty(2, 3, side, side, device="meta"), torch.empty(2, device="meta")
        for sizes in (None, numbers):
            attack_steps.launch_step(images, images, images, 1 / 255, sizes, 4 / 255)
        attack_steps.launch_start(images, numbers.long(), 4 / 255, 0, 0, 0)


def _launch_layer_norm(stream: torch.dtype, dtype: torch.dtype) -> None:
    for width in TOWER_WIDTHS:
        x, branch = (torch.empty(TOKENS, width, dtype=dtype, device="meta") for dtype in (stream, dtype))
        statistics, vector = torch.empty(TOKENS, device="meta"), torch.empty(width, device="meta")
        layer_norm.launch_sum_and_norm(x, branch, vector, vector, vector, 1e-5, dtype)
        layer_norm.launch_norm(x, vector, vector, 1e-5, dtype)
        saved = x, statistics, statistics, vector, branch
        branch_dtype = None if stream == dtype else dtype
        layer_norm.launch_backward(*saved, x, branch_dtype, torch.float32, torch.float32, torch.float32)
        layer_norm.launch_backward(*saved, None, None, None, torch.float32, torch.float32)


def _launch_moving_average(offset: int) -> None:
    """Launches on real tensors, which have addresses, ``offset`` elements after an aligned one."""
    tensors = [torch.empty(5000)[offset:] for _ in range(2)]
    moving_average.launch_once(tensors[:1], tensors[1:], torch.empty(()))


def _launch_deviations(offset: int, length: int) -> None:
    """Launches for slots of ``length`` elements, on real tensors ``offset`` elements after an aligned address."""
    weights, anchors, previous, gradients = ([torch.empty(80_000)[offset:]] for _ in range(4))
    slots = 105, [0], [0], [length]
    for products in PRODUCTS:
        tensors = weights, anchors, previous, gradients
        sizes = [len(weight) for weight in weights]
        deviations.launch_sums_once(*tensors, [0], products, *slots, sizes, torch.device("cpu"))
    coefficients, flag = torch.empty(105, dtype=torch.float64), torch.empty(())
    for stored, skipped in (([], None), (previous, None), (previous, flag)):
        for with_squares in (False, True):
            options = stored, coefficients, skipped, with_squares, *slots
            deviations.launch_add_to_gradients_once(gradients, [0], weights, anchors, *options)
            deviations.launch_add_to_weights_once(weights, anchors, *options)


def _variant(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Variant:
    """The variant that Triton's launcher would compile for this call."""
    signature: dict[str, Any] = {}
    aligned: list[tuple[int, ...]] = []
    for position, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=False)):
        if argument is None:
            options[parameter.name] = None
        elif isinstance(argument, tuple):
            # Tensors only: Triton specializes on every integer in a tuple and ignores the parameter's flags.
            types = [TYPES[tensor.dtype] for tensor in argument]
            signature[parameter.name] = type(argument)._make(types) if hasattr(argument, "_make") else tuple(types)
            aligned += [(position, member) for member in range(len(argument))]
        elif isinstance(argument, torch.Tensor):
            signature[parameter.name] = TYPES[argument.dtype]
            if not parameter.do_not_specialize_on_alignment:
                aligned.append((position,))
        elif isinstance(argument, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if not parameter.do_not_specialize and argument % 16 == 0:
                aligned.append((position,))
    compiler = {
        name: options.pop(name)
        for name in ("num_warps", "num_stages", *primitives.COMPILER_OPTIONS)
        if name in options
    }
    signature |= dict.fromkeys(options, "constexpr")
    return Variant(
        kernel.__name__, tuple(signature.items()), tuple(options.items()), tuple(aligned), tuple(compiler.items())
    )


def compile_variant(variant: Variant, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one variant."""
    kernel = KERNELS[variant.kernel]
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=dict(variant.signature),
        constexprs={(names.index(name),): value for name, value in variant.constants},
        attrs={path: [["tt.divisibility", 16]] for path in variant.aligned},
    )
    knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    row: dict[str, Any] = {"kernel": variant.kernel, "dtype": _features_dtype(variant)}
    row |= {name: str(value).removeprefix("triton.language.") for name, value in variant.constants}
    row |= {"aligned": len(variant.aligned), "num_warps": compiled.metadata.num_warps}
    return row | {"shared": compiled.metadata.shared} | _registers(compiled.asm["ptx"])


def _features_dtype(variant: Variant) -> str:
    """The dtype of the features or packed rows that a loss reads, or of a layer's first argument."""
    types = dict(variant.signature)
    packed, inputs, first = types.get("packed"), types.get("inputs"), variant.signature[0][1]
    if hasattr(packed, "rows"):
        first = packed.rows
    elif inputs:
        first = inputs.image
    elif hasattr(gradients := types.get("gradients"), "image"):
        first = gradients.image
    return (first if isinstance(first, str) else first[0]).removeprefix("*")


def _stop_at_ptx(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str] | None:
    """Triton's hook into its stages: leaves the assembler to :func:`_registers`.

    Called without stages, returns a key and its hash, by which Triton caches the kernels apart from others.
    """
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda source, metadata: b""
    return None


def _registers(ptx: str) -> dict[str, int]:
    """Registers and spilled bytes, as reported by Triton's assembler."""
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    assembler = get_ptxas(int(re.findall(r"\d+", target)[0])).path
    with tempfile.TemporaryDirectory() as scratch:
        source, cubin = Path(scratch, "kernel.ptx"), Path(scratch, "kernel.cubin")
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={target}", source, "-o", cubin]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", log)
    (stores,) = re.findall(r"(\d+) bytes spill stores", log)
    (loads,) = re.findall(r"(\d+) bytes spill loads", log)
    return {"registers": int(registers), "spilled_bytes": int(stores) + int(loads)}


def sample(recorded: list[Variant]) -> list[Variant]:
    """Few variants that cover, for each kernel, every value of every constant, type and option."""
    remaining = {variant: set(_values(variant)) for variant in recorded}
    chosen = []
    while remaining:
        variant = max(remaining, key=lambda each: len(remaining[each]))
        covered = remaining[variant]
        if not covered:
            break
        chosen.append(variant)
        remaining = {each: values - covered for each, values in remaining.items() if each is not variant}
    return chosen


def _values(variant: Variant) -> Iterator[tuple[Any, ...]]:
    """Each value that a variant has, with its kernel."""
    values = *variant.signature, *variant.constants, *variant.options, ("aligned", variant.aligned)
    return ((variant.kernel, *value) for value in values)


def digest(kernel: JITFunction[Any], recorded: list[Variant]) -> str:
    """Digest of a kernel's variants and of the code that they compile: comments and docstrings do not count."""
    functions: dict[str, str] = {}
    constants: dict[str, str] = {}
    remaining = [kernel]
    while remaining:
        function = remaining.pop()
        tree = ast.parse(textwrap.dedent(function.src))
        if (name := f"{function.__module__}.{function.__name__}") in functions:
            continue
        body = tree.body[0].body  # type: ignore[attr-defined]
        if ast.get_docstring(tree.body[0]):  # type: ignore[arg-type]
            del body[0]
        functions[name] = ast.dump(tree)
        for node in ast.walk(tree):
            used = None
            if isinstance(node, ast.Name):
                used = function.__globals__.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = getattr(function.__globals__.get(node.value.id), node.attr, None)
            if isinstance(used, JITFunction):
                remaining.append(used)
            elif isinstance(used, (int, float, triton.language.constexpr)):
                constants[ast.unparse(node)] = repr(used)
    content = sorted(functions.items()), sorted(constants.items()), sorted(map(repr, recorded))
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def digests(recorded: list[Variant]) -> dict[tuple[str, str], str]:
    """Digest of each row of the table: of each kernel and dtype."""
    rows: dict[tuple[str, str], list[Variant]] = {}
    for variant in recorded:
        rows.setdefault((variant.kernel, _features_dtype(variant)), []).append(variant)
    return {row: digest(KERNELS[row[0]], group) for row, group in sorted(rows.items())}


def faults(rows: list[dict[str, Any]], capability: int) -> list[str]:
    """Messages about variants with too much shared memory and, on Hopper, the tiles' target, with spills."""
    limit = SHARED_MEMORY[capability]
    messages = [f"shared memory above {limit}: {row}" for row in rows if row["shared"] > limit]
    if capability == 90:
        messages += [f"{row['spilled_bytes']} bytes spilled: {row}" for row in rows if row["spilled_bytes"]]
    return messages


def table(rows: list[dict[str, Any]], row_digests: dict[tuple[str, str], str]) -> str:
    """The heaviest variant of each kernel and dtype, as Markdown."""
    heaviest: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        heaviest.setdefault((row["kernel"], row["dtype"]), []).append(row)
    lines = [
        "| kernel | dtype | variants | registers | spilled bytes | shared memory | digest |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kernel, dtype), group in sorted(heaviest.items()):
        worst = [max(row[name] for row in group) for name in RESOURCES]
        cells = [kernel, dtype, len(group), *worst, row_digests[kernel, dtype]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def outdated(text: str, recorded: list[Variant]) -> list[str]:
    """Messages about rows of a table that are not of this code, these variants and this Triton."""
    expected = digests(recorded)
    listed = re.finditer(r"^\| (\w+_kernel) \| (\w+) \|.* (\w+) \|$", text, re.MULTILINE)
    actual = {row.group(1, 2): row[3] for row in listed}
    messages = [
        f"{kernel}, {dtype}: the table is of other code or other variants"
        for kernel, dtype in sorted(expected.keys() | actual.keys())
        if expected.get((kernel, dtype)) != actual.get((kernel, dtype))
    ]
    if f"Triton {triton.__version__}." not in text:
        messages.append(f"the table is not of Triton {triton.__version__}")
    return messages


def compile_all(recorded: list[Variant], capability: int) -> list[dict[str, Any]]:
    """Compiles the variants on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_variant, recorded, itertools.repeat(capability), chunksize=4))


def check_sample(recorded: list[Variant], capability: int, folder: Path) -> list[str]:
    """Compiles a sample; returns messages about it and about a table that it does not agree with."""
    path = folder / f"kernels_sm{capability}.md"
    text = path.read_text()
    remedy = f"run `python benchmarks/compile_kernels.py --capability {capability}` and commit {path}"
    if messages := outdated(text, recorded):
        return [*messages, remedy]
    chosen = sample(recorded)
    rows = compile_all(chosen, capability)
    messages = faults(rows, capability)
    listed = re.findall(r"^\| (\w+_kernel) \| (\w+) \| \d+ \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    limits = {row[:2]: dict(zip(RESOURCES, map(int, row[2:]), strict=True)) for row in listed}
    for row in rows:
        for name, limit in limits[row["kernel"], row["dtype"]].items():
            if row[name] > limit:
                messages.append(f"{name} above the table's {limit}: {row}")
    if messages:
        return [*messages, remedy]
    print(f"{path}: up to date; {len(chosen)} of {len(recorded)} variants compiled again")
    return []


def main() -> int:
    """Compiles, then writes and prints the tables; returns 1 if a variant spills or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[90], choices=sorted(SHARED_MEMORY))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--sample", action="store_true", help="compile a sample and compare it with the tables")
    arguments = parser.parse_args()
    if primitives.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    recorded = variants()
    failed = False
    for capability in arguments.capability:
        if arguments.sample:
            messages, rows = check_sample(recorded, capability, arguments.output), []
        else:
            rows = compile_all(recorded, capability)
            messages = faults(rows, capability)
        if messages:
            print("\n".join(messages), file=sys.stderr)
            failed = True
        elif rows:
            text = (
                f"# Kernels on sm_{capability}\n\nThe most that any variant uses, compiled without a GPU by "
                f"`benchmarks/compile_kernels.py` with Triton {triton.__version__}. The digest is of the code and "
                f"of the variants.\n\n{table(rows, digests(recorded))}\n"
            )
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / f"kernels_sm{capability}.md").write_text(text)
            print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
