"""Frozen parameters against open_clip's own locks, and learning rates by depth against a list written by hand."""

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
from test_towers import towers_of_kind

from dive_fast.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, TrainConfig
from dive_fast.engine import trained_parameters
from dive_fast.engine.optimizer import make_optimizer
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.model import adapters
from dive_fast.model.freezing import frozen_names, layer_factors
from dive_fast.model.towers import Towers, create


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    return create(ModelConfig(name=tiny.write_model(tmp_path_factory.mktemp("model"))))


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("kind", ["clip", "transformers, mlp", "timm, linear"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_shorthand_freezes_as_the_lock_of_open_clip(tmp_path: Path, tower: str, kind: str, unlocked: int) -> None:
    towers = towers_of_kind(tmp_path, kind)
    model: Any = open_clip.create_model(
        towers.config.name,  # type: ignore[union-attr]
        load_weights=False,
        pretrained_text=False,
        force_custom_text=True,
    )
    entry = f"{tower}:{unlocked}" if unlocked else tower
    try:
        if tower == "image":
            model.lock_image_tower(unlocked_groups=unlocked)
        else:
            model.lock_text_tower(unlocked_layers=unlocked)
    except (KeyError, RuntimeError):
        with pytest.raises(ConfigError, match=f"model.freeze: open_clip cannot lock the {tower} tower"):
            frozen_names(towers, [entry])
        return
    expected = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = {name: parameter.requires_grad for name, parameter in towers.named_parameters()}
    if not expected:
        with pytest.raises(ConfigError, match=f"model.freeze: {entry} matches no parameter"):
            frozen_names(towers, [entry])
    else:
        assert frozen_names(towers, [entry]) == expected
    assert {name: parameter.requires_grad for name, parameter in towers.named_parameters()} == before


def test_resnet_has_no_groups(tmp_path: Path) -> None:
    towers = towers_of_kind(tmp_path, "resnet")
    frozen = {name for name, _ in towers.named_parameters() if name.startswith("visual.")}
    assert frozen_names(towers, ["image"]) == frozen
    with pytest.raises(ConfigError, match=r"cannot lock the image tower \(ModifiedResNet\) as image:1: partial"):
        frozen_names(towers, ["image:1"])


def test_patterns_match_names_and_add_up(model: Towers) -> None:
    names = frozen_names(model, ["logit_scale", "*.ln_post.*"])
    assert names == {"logit_scale", "visual.ln_post.weight", "visual.ln_post.bias"}
    for pattern in ("visual.ln_past.*", "images", "image:", "image:-1"):
        with pytest.raises(ConfigError, match=f"model.freeze: {pattern.replace('*', '.*')} matches no parameter"):
            frozen_names(model, ["logit_scale", pattern])


def test_patterns_of_weights_match_their_factors(model: Towers) -> None:
    towers = copy.deepcopy(model)
    adapters.apply(towers, LoraConfig(rank=2, targets=["q", "mlp"]))
    names = frozen_names(towers, ["visual.transformer.resblocks.0.attn.in_proj_weight", "*.lora_A.*"])
    first = {name for name in names if name.startswith("visual.transformer.resblocks.0.attn.")}
    assert first == {
        f"visual.transformer.resblocks.0.attn.{part}"
        for part in (
            *("q_proj.base_layer.weight", "k_proj.weight", "v_proj.weight"),
            *("q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"),
        )
    }
    assert {name for name in names - first} == {
        name for name, _ in towers.named_parameters() if ".lora_A." in name and name not in first
    }
    locked = frozen_names(towers, ["image:2"])
    assert "visual.transformer.resblocks.0.attn.q_proj.lora_B.default.weight" in locked
    assert "visual.transformer.resblocks.1.attn.q_proj.lora_B.default.weight" not in locked


def test_learning_rates_fall_from_the_output_to_the_input(model: Towers) -> None:
    towers = copy.deepcopy(model)
    depths = {
        "logit_scale": 0,
        **dict.fromkeys(("visual.ln_post.bias", "visual.proj", "text.ln_final.weight", "text.text_projection"), 0),
        **dict.fromkeys(("visual.transformer.resblocks.1.ln_1.bias", "text.transformer.resblocks.1.ln_2.bias"), 1),
        **dict.fromkeys(("visual.transformer.resblocks.0.attn.in_proj_weight",), 2),
        **dict.fromkeys(("visual.conv1.weight", "visual.class_embedding", "visual.ln_pre.weight"), 3),
        **dict.fromkeys(("visual.positional_embedding", "text.token_embedding.weight"), 3),
        "text.positional_embedding": 3,
    }
    factors = layer_factors(towers, 0.5)
    assert {name: factors[name] for name in depths} == {name: 0.5**depth for name, depth in depths.items()}
    assert set(factors.values()) == {1.0, 0.5, 0.25, 0.125}
    train = TrainConfig(learning_rate=0.1, weight_decay=0.3, layer_decay=0.5, decay_all_parameters=False)
    optimizer = make_optimizer(train, towers, on_cpu=False)
    names = {id(parameter): name for name, parameter in towers.named_parameters()}
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.1
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == 0.1 * factors[names.pop(id(parameter))]
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0)
    assert not names


@pytest.mark.parametrize("kind", ["timm, linear", "transformers, mlp", "siglip"])
def test_learning_rates_of_other_towers(tmp_path: Path, kind: str) -> None:
    towers = towers_of_kind(tmp_path, kind)
    factors = layer_factors(towers, 0.5)
    tops = {name for name, factor in factors.items() if factor == 1}
    blocks = {name for name in factors if ".blocks." in name or ".layer." in name or ".resblocks." in name}
    assert not tops & blocks
    bottoms = {name for name in factors if "embed" in name or "cls_token" in name}
    assert bottoms
    for prefix in ("visual.", "text."):
        lowest = min(factor for name, factor in factors.items() if name.startswith(prefix))
        assert all(factors[name] == lowest for name in bottoms if name.startswith(prefix))
    assert {name.rpartition(".")[0] for name in tops} >= {"visual.trunk.norm"} or kind == "transformers, mlp"


def test_learning_rates_need_blocks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.layer_decay: ModifiedResNet is not a stack of equal blocks"):
        layer_factors(towers_of_kind(tmp_path, "resnet"), 0.5)


CONSTANT: dict[str, tuple[dict[str, Any], str, str]] = {
    "adapters": ({"lora": {"rank": 2}}, "carot", "text.text_projection has no effect, since model.lora"),
    "frozen maps": ({"freeze": ["image", "text"]}, "tracer", "since model.freeze leaves these as they are"),
    "one frozen map": ({"freeze": ["image"]}, "tracer", ""),
    "no penalty": ({"lora": {"rank": 2}}, "flyp", ""),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_penalty_on_frozen_parameters_is_warned_of(
    model: Towers, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    options, name, message = CONSTANT[case]
    method = registry.create(ObjectiveConfig(name=name), model.width, total_steps=9, steps_per_epoch=3)
    trained_parameters.check(ModelConfig(name="ViT-B-16", **options), TrainConfig(), copy.deepcopy(model), method)
    assert message in caplog.text
    assert bool(message) == ("has no effect" in caplog.text)


def test_dropout_of_adapters_counts_as_random_features(model: Towers) -> None:
    config = ModelConfig(name="ViT-B-16", lora=LoraConfig(dropout=0.1))
    assert trained_parameters.consistency_of(config, model).is_random
    assert not trained_parameters.consistency_of(ModelConfig(name="ViT-B-16"), model).is_random
