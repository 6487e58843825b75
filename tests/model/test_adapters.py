"""LoRA in towers: equal features at the start, merged weights, gradients against W0 + (alpha / r) B A by hand."""

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers_models
from open_clip.modified_resnet import AttentionPool2d
from safetensors.torch import save_file
from test_towers import towers_of_kind
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dive_fast.config.schema import LoraConfig, ModelConfig
from dive_fast.errors import ConfigError
from dive_fast.model import adapters
from dive_fast.model.adapters import CalledAttentionPool
from dive_fast.model.low_rank import SplitAttention
from dive_fast.model.towers import Towers, create

ALL = ["q", "k", "v", "out", "mlp"]
KINDS = {
    "clip": ALL,
    "attentional pool": ALL,
    "eva": ALL,
    "siglip": ALL,
    "convnext": ["mlp"],
    "resnet": ["q", "k", "v", "out"],
    "transformers, mlp": ALL,
    "hf: siglip": ALL,
    "hf: quick gelu": ["q", "v"],
}
"""Kinds of models, and their targets."""


def towers_of(folder: Path, kind: str) -> Towers:
    if kind.startswith("hf: "):
        transformers_models.write(folder / "model", kind.removeprefix("hf: "))
        return create(ModelConfig(name=f"hf:{folder / 'model'}")).eval()
    towers = towers_of_kind(folder, kind)
    for name, parameter in towers.named_parameters():
        if name.endswith("gamma"):  # 1e-6 at first, so that no block would have an effect
            nn.init.ones_(parameter)
    return towers


def inputs(towers: Towers) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, *towers.preprocess.size, generator=generator)
    tokens = torch.randint(3, 9, (3, min(towers.context_length or 16, 16)), generator=generator)
    tokens[:, 8] = max(9, towers.vocabulary - 1) if towers.vocabulary else 2
    return images, tokens


def features(towers: Towers) -> tuple[Tensor, Tensor]:
    images, tokens = inputs(towers)
    with torch.no_grad():
        return towers.encode_image(images), towers.encode_text(tokens)


def randomize(towers: Towers) -> None:
    """Factors as after a long training: deltas as large as weights."""
    generator = torch.Generator().manual_seed(2)
    for layer in adapters.adapted_layers(towers):
        for factor in (layer.lora_A, layer.lora_B):
            factor.data.normal_(generator=generator).mul_(0.1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


def of_image(kind: str) -> LoraConfig:
    towers: list[Any] = ["image"] if kind in ("convnext", "resnet") else ["image", "text"]
    return LoraConfig(rank=4, alpha=6.0, targets=KINDS[kind], towers=towers)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_features_start_unchanged_and_survive_the_merge(tmp_path: Path, kind: str) -> None:
    towers = towers_of(tmp_path, kind)
    plain, before = copy.deepcopy(towers), features(towers)
    original = {name: tensor.clone() for name, tensor in towers.export(towers.state_dict()).items()}
    record = adapters.apply(towers, of_image(kind))
    for now, then in zip(features(towers), before, strict=True):
        assert_close(now, then)
    unchanged = towers.export(towers.state_dict())
    assert unchanged.keys() == original.keys()
    assert all(torch.equal(unchanged[name], original[name]) for name in original)
    randomize(towers)
    adapted = features(towers)
    merged = plain.load_exported(towers.export(towers.state_dict()))
    for tower, now, then, expected in zip(("image", "text"), features(merged), before, adapted, strict=True):
        assert_close(now, expected, 2e-6)
        is_adapted = tower in record.config.towers
        assert ((expected - then).norm() > 1e-3 * then.norm()) == is_adapted


@pytest.mark.parametrize("kind", KINDS)
def test_only_factors_and_the_logit_scale_are_trained(tmp_path: Path, kind: str) -> None:
    towers = towers_of(tmp_path, kind)
    record = adapters.apply(towers, of_image(kind))
    trained = {name for name, parameter in towers.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not adapters.is_factor(name)} == {"logit_scale"}
    assert len(trained) == 1 + 2 * len(record.layers)
    for layer in adapters.adapted_layers(towers):
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, layer.weight.shape[1]), (len(layer.weight), 4))
        assert layer.scaling == 1.5
        assert not layer.lora_B.any()
        assert layer.lora_A.any()
        assert layer.perturbation_A is layer.perturbation_B is None


def test_adapters_are_equal_on_all_ranks_and_leave_random_state(tmp_path: Path) -> None:
    towers = towers_of(tmp_path, "clip")
    first, second, other = (copy.deepcopy(towers) for _ in range(3))
    torch.manual_seed(1)
    adapters.apply(first, LoraConfig(), seed=5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    adapters.apply(second, LoraConfig(), seed=5)
    adapters.apply(other, LoraConfig(), seed=6)
    assert all(torch.equal(first.state_dict()[name], value) for name, value in second.state_dict().items())
    assert any(not torch.equal(first.state_dict()[name], value) for name, value in other.state_dict().items())


def test_open_clip_loads_the_merged_weights(tmp_path: Path) -> None:
    name = tiny.write_model(tmp_path, tiny.QUICKGELU)
    towers = create(ModelConfig(name=name)).eval()
    adapters.apply(towers, LoraConfig(rank=4, targets=["q", "v", "mlp"]))
    randomize(towers)
    save_file(towers.export(towers.state_dict()), tmp_path / "open_clip_model.safetensors")
    model: Any = open_clip.create_model(name).eval()
    images, tokens = inputs(towers)
    with torch.no_grad():
        assert_close(model.encode_image(images), towers.encode_image(images), 2e-6)
        # open_clip's own model takes texts of its complete context.
        texts = F.pad(tokens, (0, model.context_length - tokens.shape[1]))
        assert_close(model.encode_text(texts), towers.encode_text(texts), 2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_gradients_equal_the_product_written_in_fp64(tmp_path: Path, masked: bool) -> None:
    towers = towers_of(tmp_path, "clip")
    original: Any = copy.deepcopy(towers.text.transformer.resblocks[0].attn)
    adapters.apply(towers, LoraConfig(rank=3, alpha=6.0))
    randomize(towers)
    attention: Any = towers.text.transformer.resblocks[0].attn
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    mask = torch.full((5, 5), -torch.inf).triu(1) if masked else None
    output, _ = attention(x, x, x, need_weights=False, attn_mask=mask)
    output.square().sum().backward()

    weight, bias = (getattr(original, f"in_proj_{kind}").detach().double() for kind in ("weight", "bias"))
    layers = {"out_proj": (original.out_proj.weight.detach().double(), original.out_proj.bias.detach().double())}
    for name, rows in zip(("q_proj", "k_proj", "v_proj"), (slice(0, 32), slice(32, 64), slice(64, 96))):
        layers[name] = weight[rows], bias[rows]
    factors: dict[str, list[Tensor]] = {}

    def project(name: str, rows: Tensor) -> Tensor:
        layer = getattr(attention, name)
        a, b = (each["default"].weight.detach().double().requires_grad_() for each in (layer.lora_A, layer.lora_B))
        factors[name] = [a, b]
        return rows @ (layers[name][0] + 6.0 / 3 * b @ a).T + layers[name][1]

    heads = [
        project(name, x.double()).unflatten(2, (2, 16)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
    ]
    mixed = scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask.double())
    expected = project("out_proj", mixed.transpose(1, 2).flatten(2))
    expected.square().sum().backward()
    assert_close(output.double(), expected)
    for name, (a, b) in factors.items():
        layer = getattr(attention, name)
        assert a.grad is not None
        assert b.grad is not None
        assert_close(layer.lora_A["default"].weight.grad.double(), a.grad, 1e-5)
        assert_close(layer.lora_B["default"].weight.grad.double(), b.grad, 1e-5)
        assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_split_attention_equals_multihead_attention(dtype: torch.dtype | None, causal: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    split, x = SplitAttention(attention), torch.randn(3, 7, 32)
    for mask in (torch.full((7, 7), -torch.inf).triu(1) if causal else None, torch.randn(12, 7, 7)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
            actual = split(x, x, x, need_weights=False, attn_mask=mask)[0]
        assert actual.dtype == expected.dtype
        assert_close(actual.float(), expected.float(), 1e-6 if dtype is None else 1e-2)


def test_called_attention_pool_equals_that_of_open_clip() -> None:
    torch.manual_seed(0)
    pool = AttentionPool2d(3, 32, 4, 24)
    x = torch.randn(2, 32, 3, 3)
    with torch.no_grad():
        assert_close(CalledAttentionPool(pool)(x), pool(x))


def test_perturbation_acts_within_its_context_alone(tmp_path: Path) -> None:
    towers = towers_of(tmp_path, "clip")
    adapters.apply(towers, LoraConfig(rank=4, targets=["q", "mlp"]))
    randomize(towers)
    frozen = adapters.adapted_layers(towers)[0].lora_A.requires_grad_(False)
    before, exported = features(towers), towers.export(towers.state_dict())
    adapters.add_perturbation(towers, 2)
    layers = adapters.adapted_layers(towers)
    assert not frozen.requires_grad
    assert layers[1].lora_A.requires_grad
    for layer in layers:
        assert layer.perturbation_A is not None
        assert layer.perturbation_B is not None
        assert (layer.perturbation_A.shape[0], layer.perturbation_B.shape[1]) == (2, 2)
        assert not layer.perturbation_A.any() | layer.perturbation_B.any()
        assert not layer.perturbation_A.requires_grad | layer.perturbation_B.requires_grad
        layer.perturbation_A.normal_()
        layer.perturbation_B.normal_()
    assert all(torch.equal(now, then) for now, then in zip(features(towers), before, strict=True))
    with adapters.perturbation(towers):
        perturbed = features(towers)
    assert all(torch.equal(now, then) for now, then in zip(features(towers), before, strict=True))
    assert all(torch.equal(value, exported[name]) for name, value in towers.export(towers.state_dict()).items())
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(layer.perturbation_B @ layer.perturbation_A)  # type: ignore[operator]
    for now, expected in zip(features(towers), perturbed, strict=True):
        assert_close(now, expected, 1e-5)


def test_perturbation_ends_with_an_error(tmp_path: Path) -> None:
    towers = towers_of(tmp_path, "clip")
    adapters.apply(towers, LoraConfig())
    adapters.add_perturbation(towers, 2)
    before = features(towers)
    for layer in adapters.adapted_layers(towers):
        nn.init.ones_(layer.perturbation_A)  # type: ignore[arg-type]
        nn.init.ones_(layer.perturbation_B)  # type: ignore[arg-type]
    with pytest.raises(KeyError), adapters.perturbation(towers):
        raise KeyError
    assert torch.equal(features(towers)[0], before[0])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "target": (
        "convnext",
        {"towers": ["image"]},
        r"targets: the image tower \(TimmModel\) has no layer q; it has mlp",
    ),
    "packed": ("eva", {"targets": ["q", "v"]}, "visual.*qkv of the image tower .* not q, v alone"),
    "rank": (
        "clip",
        {"rank": 33},
        "rank = 33 exceeds the smaller side of visual.*q_proj, 32 x 32; use at most 32",
    ),
    "resnet": ("resnet", {"targets": ["mlp"], "towers": ["image"]}, "has no layer mlp; it has k, out, q, v"),
    "no blocks": (
        "timm, attention pool",
        {"towers": ["image"]},
        "has no layer q; it has none that can be adapted",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_adapters_are_refused(tmp_path: Path, case: str) -> None:
    kind, options, message = REFUSED[case]
    towers = towers_of(tmp_path, kind)
    before = [name for name, _ in towers.named_modules()]
    with pytest.raises(ConfigError, match=message):
        adapters.check(towers, LoraConfig(**options))
    assert [name for name, _ in towers.named_modules()] == before


def test_last_map_has_its_adapter(tmp_path: Path) -> None:
    towers = towers_of(tmp_path, "resnet")
    plain = copy.deepcopy(towers)
    adapters.apply(towers, of_image("resnet"))
    randomize(towers)
    image_map, _ = towers.projections()
    expected, _ = plain.load_exported(towers.export(towers.state_dict())).projections()
    assert_close(image_map, expected)
    image_map.square().sum().backward()
    assert towers.visual.attnpool.c_proj.lora_A["default"].weight.grad.any()


def test_layer_that_is_not_called_is_refused(tmp_path: Path) -> None:
    towers = towers_of(tmp_path, "eva")
    block: Any = towers.visual.trunk.blocks[1].attn
    block.forward = lambda x, *_, **__: x @ block.qkv.weight[: x.shape[-1]]
    with pytest.raises(ConfigError, match=r"visual.trunk.blocks.1.attn.qkv cannot be adapted, nor 1 more"):
        adapters.apply(towers, LoraConfig(rank=4))
