"""Measures the layers between the products of a transformer block: ``python benchmarks/blocks.py``.

The layers alone and one block, forward and backward, at the sizes of ViT-B/16 with 512 images (100,864 tokens of
width 768) in fp16: the kernels, and the same layers as open_clip's modules under autocast. Bytes are those that
the kernels have to move, each input and output once. Results of both are compared before they are timed. Without
a GPU: a tiny size, as a check.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from losses import DEVICE
from micro import HALF, forward_backward, median_seconds, write
from open_clip.transformer import QuickGELU, Transformer
from torch import Tensor, nn

from dive_fast.kernels import add_layer_norm, biased_activation, split_qkv
from dive_fast.model.fast_blocks import FastTransformer
from dive_fast.model.transformer_blocks import SavedInputQuickGELU

IMAGES, TOKENS, WIDTH, HEADS = (512, 197, 768, 12) if DEVICE.type == "cuda" else (2, 5, 64, 2)
EPSILON = 1e-5
TOLERANCE = 2e-2
"""Largest difference of the two competitors' gradients, relative to the largest entry: fp16 rounds many times."""


class Layer(NamedTuple):
    """One layer: the fused kernels, the modules they replace, and what they have to move."""

    fused: Callable[[], object]
    plain: Callable[[], object]
    gigabytes: float


def layers() -> dict[str, Layer]:
    """The layers between two products."""
    torch.manual_seed(0)
    unit = IMAGES * TOKENS * WIDTH * HALF.itemsize / 1e9

    def rows(width: int) -> Tensor:
        return torch.randn(IMAGES, TOKENS, width, device=DEVICE, dtype=HALF)

    def vector(width: int) -> Tensor:
        return torch.randn(width, device=DEVICE)

    hidden, bias = rows(4 * WIDTH), vector(4 * WIDTH)
    norm_inputs = [rows(WIDTH), rows(WIDTH), vector(WIDTH), vector(WIDTH), vector(WIDTH)]
    packed = rows(3 * WIDTH)
    activation = SavedInputQuickGELU()

    def fused_norm(x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return add_layer_norm(x, branch, branch_bias, weight, bias, EPSILON, HALF)

    def plain_norm(x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor) -> Any:
        x = x + (branch + branch_bias.to(HALF))
        return x, F.layer_norm(x.float(), (WIDTH,), weight, bias, EPSILON).to(HALF)

    def plain_split(packed: Tensor) -> list[Tensor]:
        # As in torch.nn.functional.multi_head_attention_forward.
        parts = packed.unflatten(-1, (3, WIDTH)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        return [part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts]

    return {
        # The product before adds the bias of the plain activation.
        "activation": Layer(
            forward_backward(lambda x, bias: biased_activation(x, bias, "quick_gelu"), [hidden, bias]),
            forward_backward(lambda x, bias: activation(x + bias.to(HALF)), [hidden, bias]),
            20 * unit,
        ),
        "layer norm": Layer(
            forward_backward(fused_norm, norm_inputs), forward_backward(plain_norm, norm_inputs), 8 * unit
        ),
        "packed QKV": Layer(
            forward_backward(lambda packed: split_qkv(packed, None, HEADS), [packed]),
            forward_backward(plain_split, [packed]),
            6 * unit,
        ),
    }


def blocks(compiled: bool) -> dict[str, Callable[[], object]]:
    """One block: fused, as open_clip's modules, and the latter compiled."""
    torch.manual_seed(0)
    x = torch.randn(IMAGES, TOKENS, WIDTH, device=DEVICE, dtype=HALF)

    def make() -> Transformer:
        torch.manual_seed(0)
        transformer = Transformer(WIDTH, 1, HEADS, act_layer=QuickGELU).to(DEVICE)
        return transformer

    plain = make()
    plain.resblocks[0].mlp.gelu = SavedInputQuickGELU()
    fused = FastTransformer(make(), is_causal=False, is_pooled=False, defers=False)
    competitors: dict[str, nn.Module] = {"fused": fused, "plain": plain}
    if compiled:
        other = make()
        other.resblocks[0].compile(dynamic=False)
        competitors["compiled"] = other
    return {name: _block_call(module, x) for name, module in competitors.items()}


def _block_call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    parameters = list(module.parameters())
    upstream = torch.randn(x.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    leaf = x.detach().requires_grad_()

    def call() -> object:
        with torch.autocast(DEVICE.type, HALF, enabled=DEVICE.type == "cuda"):
            output = module(leaf)
        return torch.autograd.grad(output, [leaf, *parameters], upstream.to(output.dtype))

    return call


def check_equal(name: str, first: Any, second: Any) -> None:
    """Compares gradients.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    for a, b in zip(first, second, strict=True):
        difference = float((a.double() - b.double()).abs().max() / b.double().abs().max())
        # Written so that NaN fails.
        assert difference <= TOLERANCE, f"{name}: gradients differ by {difference:.1e} of their largest entry"


def main() -> None:
    """Compares, measures, prints a table and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    print("| layer, forward + backward | GB | fused, ms | TB/s | plain, ms | fused / plain |\n" + "|---" * 6 + "|")
    for name, layer in layers().items():
        check_equal(name, layer.fused(), layer.plain())
        fused, plain = median_seconds(layer.fused), median_seconds(layer.plain)
        figures[name] = {"gigabytes": layer.gigabytes, "fused": fused, "plain": plain}
        rate = layer.gigabytes / fused / 1e3
        print(
            f"| {name} | {layer.gigabytes:.2f} | {1e3 * fused:.3f} | {rate:.2f} | {1e3 * plain:.3f} "
            f"| {fused / plain:.2f} |",
            flush=True,
        )
    calls = blocks(compiled=DEVICE.type == "cuda")
    check_equal("block", calls["fused"](), calls["plain"]())
    figures["block"] = {name: median_seconds(call) for name, call in calls.items()}
    write("blocks", figures, options.results)
    whole = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in figures["block"].items())
    parts = ", ".join(
        f"{name} {1e3 * layer['fused']:.2f} ms" for name, layer in figures.items() if name != "block"
    )
    print(f"measured: {parts}; a block: {whole}")


if __name__ == "__main__":
    main()
