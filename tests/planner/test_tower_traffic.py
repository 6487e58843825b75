"""Bytes that the towers move next to matrix products, and a step's predicted time, at ViT-B/16 with 512 pairs."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

from dive_fast.config.schema import ModelConfig
from dive_fast.methods.run_config import load_run_config
from dive_fast.model import fast_blocks
from dive_fast.model.towers import Towers, create
from dive_fast.model.transformer_blocks import blocks_of, replace_quickgelu
from dive_fast.planner.gpu_specs import GPUS
from dive_fast.planner.memory_tracker import Tracker
from dive_fast.planner.operations import Operation
from dive_fast.planner.plan import Plan
from dive_fast.planner.simulate import fake_tensors, plan_run, simulate_fast_blocks

PAIRS, TEXT_LENGTH = 512, 32
SHAPES = {"visual": (PAIRS, 197, 768), "text": (PAIRS, TEXT_LENGTH, 512)}
"""The residual stream of each tower."""
STREAM_BYTES = {"visual": 2, "text": 4}
"""Bytes of an element of the residual stream under fp16 autocast; the text tower's embeddings are fp32."""


def build_towers(is_fast: bool) -> Towers:
    towers = create(ModelConfig(name="ViT-B-16-quickgelu"), weights=False).train().set_precision("fp16")
    if is_fast:
        fast_blocks.install(towers)
        simulate_fast_blocks(towers)
    else:
        replace_quickgelu(towers)
    return towers


def elementwise_bytes(operations: Counter[Operation]) -> int:
    return sum(count * each.bytes for each, count in operations.items() if each.kind == "elementwise")


def block_bytes(towers: Towers, name: str) -> int:
    """Element-wise bytes of one block in the middle of a tower, forward and backward."""
    block = blocks_of(getattr(towers, name), "test")[5]
    dtype = torch.float16 if STREAM_BYTES[name] == 2 else torch.float32
    x = torch.empty(SHAPES[name], dtype=dtype, requires_grad=True)
    branch = torch.empty(SHAPES[name], dtype=torch.float16, requires_grad=True)
    bias = torch.empty(SHAPES[name][-1], requires_grad=True)
    with Tracker() as tracker:
        with torch.autocast("cpu", torch.float16):
            if isinstance(block, fast_blocks.FastBlock):
                outputs: tuple[Tensor, ...] = block(x, branch=branch, bias=bias)
            else:
                mask = None if name == "visual" else torch.empty(TEXT_LENGTH, TEXT_LENGTH)
                outputs = (block(x, attn_mask=mask),)
        inputs = [x, *block.parameters()]
        if len(outputs) == 2:
            inputs += [branch, bias]
        torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs], allow_unused=True)
    return elementwise_bytes(tracker.operations)


def least_block_bytes(name: str) -> int:
    """Bytes if everything between two matrix products is one pass, forward and backward."""
    pairs, length, width = SHAPES[name]
    stream = STREAM_BYTES[name]
    # Residual add and layer norm: stream and branch to stream and normed; in the backward, stream and the
    # gradients of both results to that of the stream, and of the branch if its dtype differs.
    add_and_norm = (2 * stream + 4) + (3 * stream + 2 + (0 if stream == 2 else 2))
    activation = 4 * (4 + 6)
    pack_qkv = 3 * (2 + 2)
    weights = 12 * width**2
    return pairs * length * width * (2 * add_and_norm + activation + pack_qkv) + (6 + 6) * weights


def test_fast_blocks_move_the_least_bytes() -> None:
    with fake_tensors():
        towers = build_towers(is_fast=True)
        image, text = (block_bytes(towers, name) for name in ("visual", "text"))
    assert image <= 13e9
    assert image == pytest.approx(least_block_bytes("visual"), rel=0.01)
    assert text == pytest.approx(least_block_bytes("text"), rel=0.01)


def test_plain_blocks_move_five_times_as_much() -> None:
    with fake_tensors():
        towers = build_towers(is_fast=False)
        image, text = (block_bytes(towers, name) for name in ("visual", "text"))
    # Counted independently as 35.6 GB, with one write less for each select_backward.
    assert image == pytest.approx(35.6e9 + 3 * 2 * PAIRS * 197 * 768, rel=0.01)
    assert image > 5 * least_block_bytes("visual")
    assert text > 4 * least_block_bytes("text")


def tower_bytes(towers: Towers) -> tuple[int, int]:
    """Element-wise bytes of each complete tower in one half, embeddings and poolings included."""
    with Tracker() as tracker:
        features = towers.encode_image(torch.empty(PAIRS, 3, 224, 224, dtype=torch.float16))
        features.backward(torch.empty_like(features))
        image = elementwise_bytes(tracker.operations)
        tracker.reset()
        features = towers.encode_text(torch.zeros(PAIRS, 77, dtype=torch.long), TEXT_LENGTH)
        features.backward(torch.empty_like(features))
        return image, elementwise_bytes(tracker.operations)


def test_half_moves_little_outside_of_blocks() -> None:
    with fake_tensors():
        image, text = tower_bytes(build_towers(is_fast=True))
    # The last block computes the pooled token alone, which pays for a part of the embedding.
    assert image <= 12 * least_block_bytes("visual")
    assert text <= 12 * least_block_bytes("text")


def shipped_plans(overrides: list[list[str]]) -> list[Plan]:
    configs = Path(__file__).parents[2] / "launch/configs"
    texts = ["data.target.text_length=16", "data.reference.text_length=32"]
    return [plan_run(load_run_config("vitb16_dive", [*texts, *each], configs)) for each in overrides]


@pytest.mark.slow
def test_step_of_vit_b16_at_215_ms() -> None:
    fast, plain = run_ranks(1, shipped_plans, [[], ["train.fast_blocks=false"]], init=False, timeout=300)[0]
    gpu = GPUS["h200"]
    assert fast.step_seconds(gpu) <= 0.215
    assert fast.bytes_of("target") <= fast.bytes_of("reference") <= 13 * least_block_bytes("visual") + 10e9
    assert plain.step_seconds(gpu) > 1.8 * fast.step_seconds(gpu)
    # The last of 12 blocks needs a query, a projection and an MLP for one token alone.
    assert fast.flop_per_step == pytest.approx(0.93 * plain.flop_per_step, rel=0.01)
    assert fast.peak_memory_bytes < 0.9 * plain.peak_memory_bytes
