"""Towers that drop, or look at the batch: made steady, measured, or refused for the reason."""

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

from dive_fast.config.schema import ModelConfig
from dive_fast.distributed import Ranks
from dive_fast.engine import feature_consistency
from dive_fast.engine.feature_consistency import FeatureConsistency, by_modules, measure, settle
from dive_fast.errors import ConfigError
from dive_fast.methods import method as objective
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import Towers, create
from dive_fast.planner.simulate import fake_tensors

RESNET: dict[str, Any] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TIMM = {"image_size": 32, "timm_pool": "avg", "timm_proj": "linear"}
CONVNEXT = TIMM | {"timm_model_name": "test_convnext", "timm_drop_path": 0.3}
STEADY: dict[str, dict[str, Any]] = {
    "resnet": RESNET,
    "convnext": CONVNEXT,
    "timm resnet": TIMM | {"timm_model_name": "test_resnet"},
    "attention in convolutions": TIMM | {"timm_model_name": "test_byobnet"},
    "vit with drop path": TIMM | {"image_size": 160, "timm_model_name": "test_vit", "timm_drop_path": 0.3},
    "text without causal mask": tiny.VISION,
}
"""Image towers that are one function of each sample once drop path and BatchNorm are settled."""
DROPPING: dict[str, tuple[dict[str, Any], str]] = {
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
    """A text tower of Hugging Face's, with its dropout of 0.1, and a tokenizer of a few words."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    tiny.write_tokenizer(folder)
    RobertaConfig(
        vocab_size=len(tiny.VOCABULARY), max_position_embeddings=40, pad_token_id=0, **sizes
    ).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_tokenizer_name": str(folder)}
    tree = {"embed_dim": 24, "vision_cfg": tiny.VISION, "text_cfg": text | {"context_length": 16}}
    return ModelConfig(name=tiny.write_model(folder, tree))


def siglip(folder: Path) -> ModelConfig:
    """With a bias of the logits, and a tokenizer of a few words."""
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


@pytest.mark.parametrize("kind", STEADY)
def test_drop_path_and_batch_norm_are_settled(tmp_path: Path, kind: str) -> None:
    towers = create(model_with(tmp_path, STEADY[kind], no_causal_mask=kind.startswith("text"))).train()
    norms = [module for module in towers.modules() if isinstance(module, _BatchNorm)]
    drops = [module for module in towers.modules() if getattr(module, "drop_prob", 0.0)]
    changed = settle(towers)
    assert len(changed) == bool(norms) + bool(drops)
    assert settle(towers) == []
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms if norm.weight is not None)
    state = torch.random.get_rng_state()
    assert measure(towers) == FeatureConsistency()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert towers.training
    # It can fail: what was settled is what made it unsteady.
    for norm in norms:
        norm.train()
    if norms:
        images = torch.randn(4, 3, *towers.preprocess.size)
        assert not torch.allclose(towers.encode_image(images)[:2], towers.encode_image(images[:2]), rtol=1e-2)


@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_is_named(tmp_path: Path, kind: str) -> None:
    vision, words = DROPPING[kind]
    towers = create(model_with(tmp_path, vision))
    assert settle(towers) == []
    for found in (measure(towers), by_modules(towers)):
        assert found.is_random
        assert found.reason == f"drops features at random ({words})"
    assert measure(towers, uses_text=False).is_random


class Odd(nn.Module):
    """A tower with something in it that no list of names has."""

    def __init__(self, tower: nn.Module, how: str) -> None:
        super().__init__()
        self.tower, self.how = tower, how

    def forward(self, rows: Tensor) -> Tensor:
        features: Tensor = self.tower(rows)
        if not self.training:
            return features
        if self.how == "random":
            return features * (1 + 0.1 * torch.rand_like(features))
        if self.how == "mixing":
            return features - 0.5 * features.mean(0)
        return 1.5 * features


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("how", ["random", "mixing", "scaled"])
def test_unknown_towers_are_measured_and_refused_for_what_they_do(tmp_path: Path, tower: str, how: str) -> None:
    towers = create(model_with(tmp_path, tiny.VISION))
    setattr(towers, tower, Odd(getattr(towers, tower), how))
    found, part = measure(towers), "image" if tower == "visual" else "text"
    words = {
        "random": f"makes other {part} features of the same batch each time (Odd)",
        "mixing": f"makes {part} features of a sample that depend on the other samples of its batch",
        "scaled": f"makes other {part} features in training than in evaluation",
    }
    assert found.reason == words[how]
    assert (found.is_random, found.is_per_sample) == (how == "random", how == "scaled")
    for micro, name in ((4, "flyp"), (None, "dive"), (None, "flyp")):
        settings = config(tmp_path, 0, "sequential", micro, name=name)
        is_refused = (micro is not None and how != "scaled") or (name == "dive" and how != "random")
        if not is_refused:
            feature_consistency.check(settings, found)
            continue
        with pytest.raises(ConfigError) as caught:
            feature_consistency.check(settings, found)
        assert words[how] in str(caught.value)
        assert str(caught.value).startswith("train.micro_batch_size: " if micro is not None else "model.name: ")


def test_broken_weights_are_told_before_anything_is_embedded(tmp_path: Path) -> None:
    towers = create(model_with(tmp_path, tiny.VISION))
    with torch.no_grad():
        towers.text.token_embedding.weight[:] = float("nan")
    with pytest.raises(ConfigError, match="the text tower's features are not finite: its weights are broken"):
        measure(towers)
    assert not measure(towers, uses_text=False).is_random


def test_text_tower_of_hugging_face_is_random_only_where_it_runs(tmp_path: Path) -> None:
    towers = create(roberta(tmp_path))
    found = measure(towers)
    assert found.is_random
    assert found.reason.startswith("drops features at random (dropout 0.1 in ")
    assert measure(towers, uses_text=False) == FeatureConsistency()


def paths(folders: dict[str, Path]) -> dict[Any, Any]:
    """On one rank: gradients and losses of a step of each model, whole, in pieces and recomputed."""
    objective.Part.backend = "torch"
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
            assert all(torch.equal(value, after[name]) for name, value in before.items()), "statistics moved"
    return results


def test_steps_of_settled_towers_have_the_papers_gradients(tmp_path: Path) -> None:
    folders = {kind: tmp_path / kind for kind in ("resnet", "convnext")}
    for kind, folder in folders.items():
        model_with(folder, STEADY[kind])
    (results,) = run_ranks(1, paths, folders, init=False, timeout=300)
    for kind, folder in folders.items():
        expected, losses = oracle(folder)
        for key in (key for key in results if key[0] == kind):
            gradients, metrics = results[key]
            # A bias of keys has none but that of rounding, since a softmax takes no notice of it.
            names = [name for name in expected if not name.endswith("k_proj.bias")]
            assert gradients.keys() == expected.keys()
            assert_same_gradients(
                {name: gradients[name] for name in names}, {name: expected[name] for name in names}, 2e-5
            )
            assert metrics["loss"] == pytest.approx(losses["loss"], rel=1e-4), key


def train_all(trees: list[dict[str, Any]]) -> list[Any]:
    """Whole runs in one process: their first line of metrics, or why they were refused."""
    from dive_fast.distributed import join
    from dive_fast.train.loop import train

    objective.Part.backend = "torch"
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


def test_runs_of_unusual_towers(tmp_path: Path) -> None:
    """DiVE by each, exported as open_clip takes it; what cannot run in pieces is refused before it is embedded."""
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
    (found,) = run_ranks(1, train_all, list(trees.values()), init=False, timeout=300)
    results = dict(zip(trees, found, strict=True))
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
        # A SigLIP's bias has no part in a softmax loss.
        statistics = [name for name in before if "running_" in name or name == "logit_bias"]
        assert bool(statistics) == (kind in ("resnet", "siglip"))
        assert all(torch.equal(before[name], ours.state_dict()[name]) for name in statistics)


SETTLED = ("DropPath", "PatchDropout", "PatchDropoutWithIndices", "Dropout", "AttentionPool2d")
"""Modules that ask whether they are trained, and are set to 0 or found by their rate, 0 in the last one."""
NAMES = ["RN50", "convnext_base", "ViTamin-S", "MobileCLIP-S1", "swin_base_patch4_window7_224", "EVA02-B-16"]
REFUSED = ["coca_ViT-B-32", "roberta-ViT-B-32"]


@pytest.mark.parametrize(
    "names", [NAMES + REFUSED, pytest.param(open_clip.list_models(), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_built_in_models_are_settled_or_refused_at_once(names: list[str]) -> None:
    refused = {}
    for name in names:
        with fake_tensors():
            try:
                towers = create(ModelConfig(name=name), weights=False)
            except ConfigError as error:
                refused[name] = str(error)
                continue
            settle(towers.train())
        assert by_modules(towers) == FeatureConsistency(), name
        for module in towers.modules():
            # Whatever else asks whether it is trained would have to be looked at: this is a list of all.
            source = (
                inspect.getsource(type(module).forward) if type(module).forward is not nn.Module.forward else ""
            )
            asks = "self.training" in source and not isinstance(module, _BatchNorm)
            assert not asks or type(module).__name__ in SETTLED or _drops_by_rate(module), (name, type(module))
            assert not (isinstance(module, _BatchNorm) and module.training)
    for name, message in refused.items():
        config = open_clip.get_model_config(name)
        needs_network = "hf_model_name" in config["text_cfg"]
        assert "multimodal_cfg" in config or needs_network, message
        assert "\n" not in message
    assert not set(REFUSED) & set(names) - refused.keys()


def _drops_by_rate(module: nn.Module) -> bool:
    """Attention that passes a rate of dropout on, which is 0."""
    rates = [getattr(module, name, None) for name in ("attn_drop", "attn_drop_p", "dropout")]
    values = [rate.p if isinstance(rate, nn.Dropout) else rate for rate in rates if rate is not None]
    return bool(values) and not any(values)


def test_what_is_settled_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_with(tmp_path, CONVNEXT)
    towers: Towers = create(ModelConfig(name=f"local-dir:{tmp_path}"))
    assert by_modules(towers).is_random
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        feature_consistency.prepare(config(tmp_path, 0, "sequential", 4), towers, Ranks(0, 1, torch.device("cpu")))
    assert [record.getMessage() for record in caplog.records] == [
        f"local-dir:{tmp_path}: in training, drop path is 0 instead of 0.3: the same features as in evaluation"
    ]
    assert towers.feature_consistency == FeatureConsistency()
