"""Towers whose features are random or depend on the batch: made consistent, measured, or refused."""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from distributed import run_ranks
from step_oracle import Stage, assert_same_gradients, config, oracle
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import RobertaConfig

from dive_fast.config.schema import LoraConfig, ModelConfig, ObjectiveConfig
from dive_fast.distributed import Ranks
from dive_fast.engine.feature_consistency import (
    FeatureConsistency,
    check_config,
    inspect_modules,
    make_consistent,
    measure,
    prepare,
)
from dive_fast.errors import ConfigError
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import Towers, create
from dive_fast.planner.simulate import fake_tensors

RESNET: dict[str, Any] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TIMM = {"image_size": 32, "timm_pool": "avg", "timm_proj": "linear"}
CONVNEXT = TIMM | {"timm_model_name": "test_convnext", "timm_drop_path": 0.3}
CONSISTENT: dict[str, dict[str, Any]] = {
    "resnet": RESNET,
    "convnext": CONVNEXT,
    "timm resnet": TIMM | {"timm_model_name": "test_resnet"},
    "attention in convolutions": TIMM | {"timm_model_name": "test_byobnet"},
    "vit with drop path": TIMM | {"image_size": 160, "timm_model_name": "test_vit", "timm_drop_path": 0.3},
    "text without causal mask": tiny.VISION,
}
"""Image towers that are consistent without drop path and with BatchNorms in evaluation mode."""
RANDOM: dict[str, tuple[dict[str, Any], str]] = {
    "patch dropout": (tiny.VISION | {"patch_dropout": 0.5}, "PatchDropout 0.5 in 1 module"),
    "dropout": (
        TIMM | {"image_size": 160, "timm_model_name": "test_vit", "timm_drop": 0.2},
        "dropout 0.2 in 1 module",
    ),
}


def model_with(folder: Path, vision: dict[str, Any], **text: Any) -> ModelConfig:
    name = tiny.write_model(folder, {"embed_dim": 24, "vision_cfg": vision, "text_cfg": tiny.TEXT | text})
    return ModelConfig(name=name)


def roberta(folder: Path) -> ModelConfig:
    """A text tower of Hugging Face with its dropout of 0.1, and a tokenizer of a few words."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    tiny.write_tokenizer(folder)
    RobertaConfig(
        vocab_size=len(tiny.VOCABULARY), max_position_embeddings=40, pad_token_id=0, **sizes
    ).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_tokenizer_name": str(folder)}
    tree = {"embed_dim": 24, "vision_cfg": tiny.VISION, "text_cfg": text | {"context_length": 16}}
    return ModelConfig(name=tiny.write_model(folder, tree))


def siglip(folder: Path) -> ModelConfig:
    """A model with a bias of the logits, and a tokenizer of a few words."""
    tiny.write_tokenizer(folder)
    text = tiny.TEXT | {"context_length": 16, "vocab_size": len(tiny.VOCABULARY), "hf_tokenizer_name": str(folder)}
    text |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    tree = {
        "embed_dim": 24,
        "vision_cfg": tiny.VISION,
        "text_cfg": text,
        "custom_text": True,
        "init_logit_bias": -10,
    }
    return ModelConfig(name=tiny.write_model(folder, tree))


@pytest.mark.parametrize("kind", CONSISTENT)
def test_make_consistent_disables_drop_path_and_batch_statistics(tmp_path: Path, kind: str) -> None:
    towers = create(model_with(tmp_path, CONSISTENT[kind], no_causal_mask=kind.startswith("text"))).train()
    norms = [module for module in towers.modules() if isinstance(module, _BatchNorm)]
    drops = [module for module in towers.modules() if getattr(module, "drop_prob", 0.0)]
    changes = make_consistent(towers)
    assert len(changes) == bool(norms) + bool(drops)
    assert make_consistent(towers) == []
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms if norm.weight is not None)
    state = torch.random.get_rng_state()
    assert measure(towers) == FeatureConsistency()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert towers.training
    # The test can fail: with batch statistics, features depend on the batch.
    for norm in norms:
        norm.train()
    if norms:
        images = torch.randn(4, 3, *towers.preprocess.size)
        assert not torch.allclose(towers.encode_image(images)[:2], towers.encode_image(images[:2]), rtol=1e-2)


@pytest.mark.parametrize("kind", RANDOM)
def test_measure_names_dropout(tmp_path: Path, kind: str) -> None:
    vision, description = RANDOM[kind]
    towers = create(model_with(tmp_path, vision))
    assert make_consistent(towers) == []
    for consistency in (measure(towers), inspect_modules(towers)):
        assert consistency.is_random
        assert consistency.reason == f"drops features at random ({description})"
    assert measure(towers, uses_text=False).is_random


class Inconsistent(nn.Module):
    """A tower with an inconsistency that its module classes do not show."""

    def __init__(self, tower: nn.Module, kind: str) -> None:
        super().__init__()
        self.tower, self.kind = tower, kind

    def forward(self, rows: Tensor) -> Tensor:
        features: Tensor = self.tower(rows)
        if not self.training:
            return features
        if self.kind == "random":
            return features * (1 + 0.1 * torch.rand_like(features))
        if self.kind == "mixing":
            return features - 0.5 * features.mean(0)
        return 1.5 * features


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("kind", ["random", "mixing", "scaled"])
def test_check_config_refuses_unsupported_options(tmp_path: Path, tower: str, kind: str) -> None:
    towers = create(model_with(tmp_path, tiny.VISION))
    setattr(towers, tower, Inconsistent(getattr(towers, tower), kind))
    consistency, name = measure(towers), "image" if tower == "visual" else "text"
    reasons = {
        "random": f"computes different {name} features of one batch at each call (Inconsistent)",
        "mixing": f"computes {name} features of a sample that depend on the other samples of its batch",
        "scaled": f"computes other {name} features in training than in evaluation",
    }
    assert consistency.reason == reasons[kind]
    assert (consistency.is_random, consistency.is_per_sample) == (kind == "random", kind == "scaled")
    for micro, method in ((4, "flyp"), (None, "dive"), (None, "flyp")):
        settings = config(tmp_path, 0, "sequential", micro, name=method)
        is_refused = (micro is not None and kind != "scaled") or (method == "dive" and kind != "random")
        if not is_refused:
            check_config(settings, consistency)
            continue
        with pytest.raises(ConfigError) as caught:
            check_config(settings, consistency)
        assert reasons[kind] in str(caught.value)
        assert str(caught.value).startswith("train.micro_batch_size: " if micro is not None else "model.name: ")


def test_measure_refuses_weights_with_nan(tmp_path: Path) -> None:
    towers = create(model_with(tmp_path, tiny.VISION))
    with torch.no_grad():
        towers.text.token_embedding.weight[:] = float("nan")
    with pytest.raises(ConfigError, match="the text tower's features are not finite: its weights are broken"):
        measure(towers)
    assert not measure(towers, uses_text=False).is_random


def test_hugging_face_text_tower_is_random_only_if_used(tmp_path: Path) -> None:
    towers = create(roberta(tmp_path))
    consistency = measure(towers)
    assert consistency.is_random
    assert consistency.reason.startswith("drops features at random (dropout 0.1 in ")
    assert measure(towers, uses_text=False) == FeatureConsistency()


def run_paths(folders: dict[str, Path]) -> dict[Any, Any]:
    """Gradients and losses of a step of each model on one rank: complete, in micro-batches, and joint."""
    Part.backend = "torch"
    results: dict[Any, Any] = {}
    for kind, folder in folders.items():
        stage = Stage(folder)
        for zero, schedule, micro, options in (
            (0, "sequential", None, {}),
            (2, "sequential", 3, {}),
            (0, "joint", 3, {}),
        ):
            engine = stage.engine(zero, schedule, micro, **options)
            before = {name: value.clone() for name, value in engine.towers.named_buffers()}
            results[kind, schedule, micro] = stage.accumulate(engine)
            after = dict(engine.towers.named_buffers())
            assert all(torch.equal(value, after[name]) for name, value in before.items()), "statistics changed"
    return results


def test_consistent_towers_have_the_papers_gradients(tmp_path: Path) -> None:
    folders = {kind: tmp_path / kind for kind in ("resnet", "convnext")}
    for kind, folder in folders.items():
        model_with(folder, CONSISTENT[kind])
    (results,) = run_ranks(1, run_paths, folders, init=False, timeout=300)
    for kind, folder in folders.items():
        expected, losses = oracle(folder)
        for key in (key for key in results if key[0] == kind):
            gradients, metrics = results[key]
            # A softmax ignores the bias of keys, whose gradient is rounding alone.
            names = [name for name in expected if not name.endswith("k_proj.bias")]
            assert gradients.keys() == expected.keys()
            assert_same_gradients(
                {name: gradients[name] for name in names}, {name: expected[name] for name in names}, 2e-5
            )
            assert metrics["loss"] == pytest.approx(losses["loss"], rel=1e-4), key


def train_all(trees: list[dict[str, Any]]) -> list[Any]:
    """Complete runs in one process: the first line of metrics of each, or the error."""
    from dive_fast.distributed import join
    from dive_fast.training.loop import train

    Part.backend = "torch"
    ranks, results = join(), []
    for tree in trees:
        folder = Path(tree["train"]["output"])
        try:
            train(RunConfig.model_validate_json(json.dumps(tree)), folder, ranks)
        except ConfigError as error:
            results.append((str(error), (folder / "teacher").exists()))
            continue
        results.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]))
    return results


@pytest.mark.slow
def test_runs_of_unusual_towers_train_or_are_refused(tmp_path: Path) -> None:
    """DiVE with each model, exported for open_clip; micro-batches of a random tower are refused at the start."""
    models = {
        "resnet": model_with(tmp_path / "resnet", RESNET),
        "convnext": model_with(tmp_path / "convnext", CONVNEXT),
        "roberta": roberta(tmp_path / "roberta"),
        "siglip": siglip(tmp_path / "siglip"),
    }
    trees = {}
    for kind, micro in (
        ("resnet", 3),
        ("convnext", None),
        ("roberta", None),
        ("siglip", 3),
        ("roberta", 3),
    ):
        tree = tiny.write_config(tmp_path / f"{kind}-{micro}", max_steps=2, micro_batch_size=micro)
        tree["model"] = {"name": models[kind].name}
        if kind == "convnext":
            tree["teacher"] = {"mode": "online"}
        trees[kind, micro] = tree
    (outcomes,) = run_ranks(1, train_all, list(trees.values()), init=False, timeout=300)
    results = dict(zip(trees, outcomes, strict=True))
    message, was_embedded = results.pop(("roberta", 3))
    assert message.startswith(
        f"train.micro_batch_size: {models['roberta'].name} drops features at random (dropout 0.1"
    )
    assert not was_embedded
    for (kind, micro), line in results.items():
        if kind != "roberta":
            assert max(line["image_norm"], line["text_norm"]) < 1e-5, kind
        run = Path(trees[kind, micro]["train"]["output"])
        theirs = open_clip.create_model(f"local-dir:{run}").eval()
        ours = create(ModelConfig(name=f"local-dir:{run}")).eval()
        images = torch.randn(2, 3, *ours.preprocess.size)
        tokens = open_clip.get_tokenizer(f"local-dir:{run}")(["a cat", "the photo of a dog"])
        with torch.no_grad():
            assert torch.equal(theirs.encode_image(images), ours.encode_image(images))
            assert torch.equal(theirs.encode_text(tokens), ours.encode_text(tokens))
        before = create(models[kind]).state_dict()
        assert any(not torch.equal(value, ours.state_dict()[name]) for name, value in before.items())
        # A softmax loss does not depend on SigLIP's bias.
        statistics = [name for name in before if "running_" in name or name == "logit_bias"]
        assert bool(statistics) == (kind in ("resnet", "siglip"))
        assert all(torch.equal(before[name], ours.state_dict()[name]) for name in statistics)


CONSISTENT_MODULES = ("DropPath", "PatchDropout", "PatchDropoutWithIndices", "Dropout", "AttentionPool2d")
"""Modules whose forward depends on ``training``: their rate is set to 0, or detected; it is 0 in the last one."""
NAMES = ["RN50", "convnext_base", "ViTamin-S", "MobileCLIP-S1", "swin_base_patch4_window7_224", "EVA02-B-16"]
REFUSED = ["coca_ViT-B-32", "roberta-ViT-B-32"]


@pytest.mark.parametrize(
    "names", [NAMES + REFUSED, pytest.param(open_clip.list_models(), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_built_in_models_are_consistent_or_refused(names: list[str]) -> None:
    refused = {}
    for name in names:
        with fake_tensors():
            try:
                towers = create(ModelConfig(name=name), weights=False)
            except ConfigError as error:
                refused[name] = str(error)
                continue
            make_consistent(towers.train())
        assert inspect_modules(towers) == FeatureConsistency(), name
        for module in towers.modules():
            # Any other module that reads `training` has to be examined; the list is complete.
            source = (
                inspect.getsource(type(module).forward) if type(module).forward is not nn.Module.forward else ""
            )
            reads_mode = "self.training" in source and not isinstance(module, _BatchNorm)
            is_consistent = type(module).__name__ in CONSISTENT_MODULES or _drops_by_rate(module)
            assert not reads_mode or is_consistent, (name, type(module))
            assert not (isinstance(module, _BatchNorm) and module.training)
    for name, message in refused.items():
        config = open_clip.get_model_config(name)
        needs_network = "hf_model_name" in config["text_cfg"]
        assert "multimodal_cfg" in config or needs_network, message
        assert "\n" not in message
    assert not set(REFUSED) & set(names) - refused.keys()


def _drops_by_rate(module: nn.Module) -> bool:
    """Whether a module is an attention that passes on a dropout rate of 0."""
    rates = [getattr(module, name, None) for name in ("attn_drop", "attn_drop_p", "dropout")]
    values = [rate.p if isinstance(rate, nn.Dropout) else rate for rate in rates if rate is not None]
    return bool(values) and not any(values)


@pytest.mark.parametrize(("dropout", "key"), [(0.1, "model.lora.dropout"), (0.0, "model.name")])
def test_random_features_of_views_name_their_cause(tmp_path: Path, dropout: float, key: str) -> None:
    model = ModelConfig(name="ViT-B-16", lora=LoraConfig(dropout=dropout))
    objective = ObjectiveConfig(name=None, target="grace", reference="dive")
    options = config(tmp_path, 0, "sequential", None).model_copy(update={"model": model, "objective": objective})
    with pytest.raises(ConfigError, match=rf"^{key}: this objective encodes views .* ViT-B-16 drops"):
        check_config(options, FeatureConsistency(is_random=True, reason="drops features"))


def test_prepare_warns_of_changes_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_with(tmp_path, CONVNEXT)
    towers: Towers = create(ModelConfig(name=f"local-dir:{tmp_path}"))
    assert inspect_modules(towers).is_random
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prepare(config(tmp_path, 0, "sequential", 4), towers, Ranks(0, 1, torch.device("cpu")))
    assert [record.getMessage() for record in caplog.records] == [
        f"local-dir:{tmp_path}: in training, drop path is 0 instead of 0.3: the same features as in evaluation"
    ]
    assert towers.feature_consistency == FeatureConsistency()
