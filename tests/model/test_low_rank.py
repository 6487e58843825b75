"""Adapters in fast blocks: gradients of plain towers with merged weights, by the chain rule in fp64."""

import copy
from pathlib import Path

import pytest
import torch
from test_fast_blocks import BOTH, assert_equal_steps, differentiate, distance, fast, flat, flop, random_towers
from torch import Tensor

from dive_fast.config.schema import LoraConfig, ModelConfig
from dive_fast.model import adapters, low_rank
from dive_fast.model.fast_blocks import FastBlock, install
from dive_fast.model.towers import Towers, create
from dive_fast.model.transformer_blocks import recompute_activations, recompute_blocks
from dive_fast.planner.simulate import fake_tensors

CASES: dict[str, tuple[str, list[str]]] = {
    "all": ("quickgelu", ["q", "k", "v", "out", "mlp"]),
    "q and v": ("quickgelu", ["q", "v"]),
    "mlp": ("gelu", ["mlp"]),
    "out": ("layer scale", ["out"]),
    "average pool": ("average pool", ["k", "mlp"]),
    "class token": ("class token", ["q", "mlp"]),
}
"""Name -> a case of the tests of fast blocks, and targets."""
SIZES = {"images": 2, "num_texts": 3, "length": 9}


def adapted(folder: Path, case: str = "all", **options: float) -> tuple[Towers, Towers]:
    """Towers without adapters, and the same with factors as after a long training."""
    kind, targets = CASES[case]
    plain = random_towers(folder, kind)
    towers, generator = copy.deepcopy(plain), torch.Generator().manual_seed(3)
    adapters.apply(towers, LoraConfig.model_validate({"rank": 3, "alpha": 6.0, "targets": targets} | options))
    for layer in adapters.adapted_layers(towers):
        for factor in (layer.lora_A, layer.lora_B):
            factor.data.normal_(generator=generator).mul_(0.1)
    return plain, towers.train()


def expected_step(plain: Towers, towers: Towers) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features, and gradients of factors from those of merged weights in fp64: dA = s B^T dW, dB = s dW A^T."""
    assert towers.adapters is not None
    merged = copy.deepcopy(plain).double()
    state = {name: tensor.double() for name, tensor in towers.state_dict().items()}
    merged.load_state_dict(towers.adapters.merge(state))
    image, text, by_weight = differentiate(merged, **SIZES)
    gradients = {"logit_scale": by_weight["logit_scale"]} if "logit_scale" in by_weight else {}
    for layer in adapters.adapted_layers(towers):
        whole, rows = by_weight[towers.adapters.plain_name(f"{layer.name}.base_layer.weight")], slice(None)
        if (part := layer.name.rpartition(".")[2]) in low_rank.PARTS:
            width = len(layer.weight)
            rows = slice(width * low_rank.PARTS.index(part), width * (low_rank.PARTS.index(part) + 1))
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        gradients[f"{layer.name}.lora_A.default.weight"] = 2.0 * b.T @ whole[rows]
        gradients[f"{layer.name}.lora_B.default.weight"] = 2.0 * whole[rows] @ a.T
    return image, text, gradients


@pytest.mark.parametrize("case", CASES)
def test_adapted_fast_blocks_equal_merged_weights(tmp_path: Path, case: str) -> None:
    plain, towers = adapted(tmp_path, case)
    image, text, gradients = expected_step(plain, towers)
    for defers in (True, False):
        features, texts, actual = differentiate(fast(towers, defers=defers), **SIZES)
        assert max(distance(features, image), distance(texts, text)) < 1e-6
        assert actual.keys() == gradients.keys()
        assert all(distance(actual[name], gradients[name]) < 5e-6 for name in gradients)
    assert_equal_steps(fast(towers), towers, **SIZES)
    assert install(towers) == BOTH


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_adapted_fast_blocks_round_no_more_than_peft(tmp_path: Path, precision: torch.dtype, backend: str) -> None:
    plain, towers = adapted(tmp_path)
    exact = expected_step(plain, towers)
    errors = []
    for each in (towers, fast(towers, backend)):
        image, text, gradients = differentiate(each, autocast=precision, **SIZES)
        ordered = {name: gradients[name] for name in exact[2]}
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        errors.append(
            [distance(image, exact[0]), distance(text, exact[1]), distance(flat(ordered), flat(exact[2]))]
        )
    for of_peft, error in zip(*errors, strict=True):
        assert 1e-5 < error < 1.5 * of_peft


def test_perturbation_acts_in_fast_blocks(tmp_path: Path) -> None:
    _, towers = adapted(tmp_path)
    adapters.add_perturbation(towers, 2)
    for layer in adapters.adapted_layers(towers):
        for factor in (layer.perturbation_A, layer.perturbation_B):
            assert factor is not None
            factor.requires_grad_().data.normal_().mul_(0.1)
    blocks = fast(towers)
    assert_equal_steps(blocks, towers, **SIZES)
    with adapters.perturbation(blocks), adapters.perturbation(towers):
        assert_equal_steps(blocks, towers, **SIZES)
        assert "visual.transformer.resblocks.0.attn.q_proj.lora_B.perturbation.weight" in differentiate(blocks)[2]


def test_recomputation_of_adapted_blocks(tmp_path: Path) -> None:
    _, towers = adapted(tmp_path)
    selective, full = fast(towers), fast(towers, defers=False)
    recompute_activations(selective)
    recompute_blocks(full)
    for each in (selective, full):
        assert_equal_steps(each, towers, **SIZES)


@pytest.mark.slow
def test_adapted_blocks_compile_without_graph_break(tmp_path: Path) -> None:
    _, towers = adapted(tmp_path)
    compiled = fast(towers)
    for block in [*compiled.visual.transformer.resblocks, *compiled.text.transformer.resblocks]:
        assert isinstance(block, FastBlock)
        block.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    assert_equal_steps(compiled, towers, **SIZES)


def test_frozen_factors_have_no_gradient(tmp_path: Path) -> None:
    _, towers = adapted(tmp_path)
    layers = adapters.adapted_layers(towers)
    layers[0].lora_A.requires_grad_(False)
    layers[1].lora_B.requires_grad_(False)
    assert_equal_steps(fast(towers), towers, **SIZES)


def test_dropout_and_trained_weights_keep_open_clips_blocks(tmp_path: Path) -> None:
    _, towers = adapted(tmp_path, "q and v", dropout=0.1)
    assert install(towers).endswith("the text tower keeps its own (its adapters have dropout)")
    _, towers = adapted(tmp_path, "q and v")
    towers.visual.transformer.resblocks[1].attn.v_proj.base_layer.weight.requires_grad_()
    line = install(towers)
    assert "text tower; the image tower keeps its own (it trains the weights below its adapters)" in line


@pytest.mark.slow
def test_adapters_save_flop_at_real_size() -> None:
    """The gradients of frozen weights are a third of the FLOP of full tuning; rank 16 adds some of it again."""
    with fake_tensors():
        towers = create(ModelConfig(name="ViT-B-16-quickgelu", pretrained="openai"), weights=False).train()
        full = flop(fast(towers), images=64)
        adapters.apply(towers, LoraConfig(rank=16, targets=["q", "k", "v", "out", "mlp"]))
        plain, lora = flop(towers, images=64), flop(fast(towers), images=64)
    assert lora < 0.73 * full
    assert lora < 0.93 * plain
