"""Loading weights: every kind of checkpoint gives the same bits, and nothing in a file is executed."""

import argparse
import io
import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from distributed import run_ranks
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.checkpoint.load_weights import load_into
from dive_fast.config.schema import ModelConfig
from dive_fast.errors import ConfigError
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import towers


def changed_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Other weights than those of the model, under open_clip's names."""
    torch.manual_seed(3)
    built = towers.create(model)
    return built.export({name: value + torch.randn(value.shape) for name, value in built.state_dict().items()})


def loaded(model: ModelConfig, path: Path) -> dict[str, Tensor]:
    built = load_into(towers.create(model, weights=False), model, path)
    return built.export(built.state_dict())


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config", [tiny.CLIP, tiny.CLIP | {"custom_text": True}])
def test_files_of_this_engine_and_open_clip_are_read(tmp_path: Path, config: dict[str, Any]) -> None:
    model = ModelConfig(name=tiny.write_model(tmp_path / "model", config))
    state = changed_weights(model)
    towers.save(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "plain.bin")
    # As open_clip's training writes it with several GPUs.
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "epoch_3.pt"
    )
    for file in ("model.safetensors", "plain.bin", "epoch_3.pt"):
        assert_equal(loaded(model, tmp_path / file), state)
    reference = open_clip.create_model(model.name, load_weights=False)
    open_clip.load_checkpoint(reference, str(tmp_path / "epoch_3.pt"))
    assert_equal(loaded(model, tmp_path / "epoch_3.pt"), reference.state_dict())


class Harmful:
    """An object whose unpickling creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_invalid_checkpoints_are_refused_unexecuted(tmp_path: Path) -> None:
    model = ModelConfig(name=tiny.write_model(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"nowhere.pt: no such checkpoint"):
        loaded(model, tmp_path / "nowhere.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"broken.safetensors: not weights of local-dir:.* open_clip can load"):
        loaded(model, tmp_path / "broken.safetensors")
    towers.save({"some": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other.safetensors: not weights of local-dir:"):
        loaded(model, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="not a checkpoint: expected <run>/checkpoints/step"):
        loaded(model, tmp_path)
    done = tmp_path / "done"
    torch.save({"module": Harmful(done)}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save(Harmful(done), tmp_path / "harmful.pt")
    torch.save(Harmful(done), tmp_path / "partitioned.pt")
    (tmp_path / "step1").mkdir()
    for name in ("model", "optim"):
        torch.save(Harmful(done), tmp_path / f"step1/zero_pp_rank_0_mp_rank_00_{name}_states.pt")
    for path in (tmp_path, tmp_path / "harmful.pt", tmp_path / "step1"):
        with pytest.raises(ConfigError) as caught:
            loaded(model, path)
        assert "\n" not in str(caught.value)
        assert not done.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


SQUASHED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
"""Differs from open_clip's default in every respect."""


def registered(folder: Path) -> ModelConfig:
    """A model in open_clip's list with a tag ``local`` that has local weights and another preprocessing."""
    name = f"small-{folder.name}"
    tiny.write_model(folder / "published", tiny.QUICKGELU)
    (folder / f"{name}.json").write_text(json.dumps(tiny.QUICKGELU))
    (folder / f"{name}-plain.json").write_text(json.dumps(tiny.CLIP))
    open_clip.add_model_config(folder)
    weights = str(folder / "published/open_clip_model.safetensors")
    open_clip.pretrained._PRETRAINED[name] = {"local": {"url": "-", "quick_gelu": True, **SQUASHED}}
    open_clip.factory.download_pretrained = lambda *_, **__: weights
    return ModelConfig(name=name, pretrained="local")


def by_every_route(folder: Path) -> dict[str, Any]:
    """Features of a few images, and accuracy, by each way to name the same weights."""
    from dive_fast.distributed import join
    from dive_fast.evaluation.zero_shot import evaluate
    from dive_fast.methods import method as objective
    from dive_fast.training import loop as train

    objective.Part.backend = "torch"
    model, ranks = registered(folder), join()
    tree = tiny.write_config(folder / "run", max_steps=1, learning_rate=0.0, weight_decay=0.0)
    tree["model"], tree["objective"] = model.model_dump(), {"name": "flyp"}
    target = tree["data"]["target"]
    tree["evaluate"] = {"sets": {"val": {key: target[key] for key in tiny.EVALUATION}}, "workers": 0}
    config = RunConfig.model_validate_json(json.dumps(tree))
    run = Path(tree["train"]["output"])
    results: dict[str, Any] = {"last line": train.train(config, run, ranks)["accuracy/val"]}
    file, checkpoint = run / "model.safetensors", next((run / "checkpoints").glob("step*"))
    (folder / "alone").mkdir()
    alone = folder / "alone/model.safetensors"
    alone.write_bytes(file.read_bytes())
    routes = {
        "pretrained": towers.create(model),
        "--weights FILE": load_into(towers.create(model, weights=False), model, file),
        "--weights FILE without description": load_into(towers.create(model, weights=False), model, alone),
        "--weights checkpoint": load_into(towers.create(model, weights=False), model, checkpoint),
        "model.pretrained=FILE": towers.create(ModelConfig(name=model.name, pretrained=str(file))),
        "local-dir": towers.create(ModelConfig(name=f"local-dir:{run}")),
        "other name, --weights FILE": load_into(
            towers.create(ModelConfig(name=model.name), weights=False), ModelConfig(name=model.name), file
        ),
        "default preprocessing": towers.create(ModelConfig(name=model.name, pretrained=str(alone))),
    }
    samples = [Image.open(io.BytesIO(tiny.jpeg(seed, size=(60, 33)))) for seed in range(3)]
    tokenizer = towers.tokenizer_of(model)
    for route, built in routes.items():
        images = torch.stack([tiny.shown(built.preprocess, picture) for picture in samples])
        with torch.no_grad():
            accuracy = evaluate(built.eval(), tokenizer, config.evaluate, ranks)["val"]
            results[route] = built.encode_image(images).numpy(), accuracy
    reference, _, transform = open_clip.create_model_and_transforms(f"local-dir:{run}")
    with torch.no_grad():
        images = torch.stack([transform(picture) for picture in samples])
        results["open_clip"] = reference.eval().encode_image(images).numpy(), None
    refused = []
    for wrong in (
        lambda: towers.create(ModelConfig(name=f"{model.name}-plain", pretrained=str(file))),
        lambda: load_into(
            towers.create(ModelConfig(name=f"{model.name}-plain"), weights=False),
            ModelConfig(name=f"{model.name}-plain"),
            file,
        ),
    ):
        try:
            wrong()
        except ConfigError as error:
            refused.append(str(error))
    return results | {"refused": refused}


def test_weights_give_equal_results_by_every_route(tmp_path: Path) -> None:
    (results,) = run_ranks(1, by_every_route, tmp_path, init=False)
    name, run = f"small-{tmp_path.name}", tmp_path / "run/run"
    message = (
        f"model.name: the weights in {run} are of another architecture than {name}-plain: quick_gelu = true "
        f"there, false in the model; use model.name = {name}"
    )
    assert results.pop("refused") == [message, message]
    last, (expected, accuracy) = results.pop("last line"), results["pretrained"]
    assert last == accuracy
    other, _ = results.pop("default preprocessing")
    assert not np.allclose(other, expected, rtol=1e-2)
    for route, (features, value) in results.items():
        assert np.array_equal(features, expected), route
        assert value in (accuracy, None), route


PREPROCESSING: list[dict[str, Any]] = [
    SQUASHED,
    {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    {"interpolation": "random"},
    {"resize_mode": "longest", "fill_color": 7},
    {"mean": [0, 0, 0], "std": [1, 1, 1], "resize_mode": "squash"},
    {"size": 64},
    {},
]


@pytest.mark.parametrize("size", [32, [48, 32]])
def test_preprocessing_survives_export(tmp_path: Path, size: Any) -> None:
    config = tiny.CLIP | {"vision_cfg": tiny.VISION | {"image_size": size}}
    picture = Image.open(io.BytesIO(tiny.jpeg(0, size=(60, 33))))
    for number, preprocess in enumerate(PREPROCESSING):
        folder, run = tmp_path / f"{number}", tmp_path / f"{number}/run"
        built = towers.create(ModelConfig(name=tiny.write_model(folder, config, 0, preprocess)))
        run.mkdir()
        towers.save_description(built, run)
        towers.save(built.export(built.state_dict()), run / "model.safetensors")
        again = towers.create(ModelConfig(name=f"local-dir:{run}"))
        assert again.preprocess == built.preprocess, preprocess
        assert again.model_cfg == built.model_cfg
        _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{run}")
        assert torch.equal(transform(picture), tiny.shown(built.preprocess, picture)), preprocess


def test_hugging_face_tokenizer_is_exported_too(tmp_path: Path) -> None:
    config, texts = tiny.reduced("ViT-B-16-SigLIP"), ["A cat!", "the photo of a dog"]
    tiny.write_tokenizer(tmp_path / "model")
    config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "model")
    model = ModelConfig(name=tiny.write_model(tmp_path / "model", config))
    run = tmp_path / "run"
    run.mkdir()
    # Every run has one, in another format than Hugging Face's.
    (run / "config.json").write_text(json.dumps({"config": {}, "versions": {}}))
    expected = towers.tokenizer_of(model)(texts)
    towers.save_description(towers.create(model), run)
    shutil.rmtree(tmp_path / "model")
    assert torch.equal(towers.tokenizer_of(ModelConfig(name=f"local-dir:{run}"))(texts), expected)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{run}")(texts), expected)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("ViT-B-16-SigLIP", "webli"),
        ("ViT-L-14", "laion2b_s32b_b82k"),
        ("PE-Core-T-16-384", "meta"),
        ("MobileCLIP-S1", "datacompdr"),
        ("ViT-B-32-quickgelu", "openai"),
        ("ViT-B-32-quickgelu", "open_clip-has-no-such-tag"),
    ],
)
def test_preprocessing_of_a_tag_needs_no_weights(monkeypatch: pytest.MonkeyPatch, name: str, tag: str) -> None:
    seen: dict[str, Any] = {}

    def build(*_: Any, force_preprocess_cfg: dict[str, Any] | None = None, **__: Any) -> None:
        seen.update(force_preprocess_cfg or {})
        raise RuntimeError("large")

    monkeypatch.setattr(open_clip, "create_model", build)
    with pytest.raises(ConfigError, match="large"):
        towers.create(ModelConfig(name=name, pretrained=tag), weights=False)
    wanted = open_clip.get_pretrained_cfg(name, tag)
    assert seen == {key: wanted[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in wanted}
    assert bool(seen) == (tag != "open_clip-has-no-such-tag")


def test_missing_description_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig(name=tiny.write_model(tmp_path / "model", preprocess=SQUASHED))
    built = towers.create(model, weights=False)
    towers.save(changed_weights(model), tmp_path / "model.safetensors")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_into(built, model, tmp_path / "model.safetensors")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dive_fast")] == [
        f"{tmp_path}/model.safetensors: no open_clip_config.json next to it, so images are preprocessed as for "
        f"model.name = {model.name} (mean 0.4/0.5/0.6, std 0.2/0.25/0.3, bilinear, squash)"
    ]
    for text in ("{", "{}", '{"model_cfg": []}', '{"model_cfg": {}, "preprocess_cfg": {"std": [0, 1, 1]}}', "[]"):
        (tmp_path / "open_clip_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"open_clip_config.json: not a description of an open_clip model: "):
            load_into(built, model, tmp_path / "model.safetensors")


def test_weights_of_another_size_report_interpolation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large = tiny.CLIP | {
        "vision_cfg": tiny.VISION | {"image_size": 64},
        "text_cfg": tiny.TEXT | {"context_length": 16},
    }
    tiny.write_model(tmp_path / "large", large)
    model = ModelConfig(name=tiny.write_model(tmp_path / "model"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_into(towers.create(model), model, tmp_path / "large/open_clip_model.safetensors")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("dive_fast")]
    assert line.endswith(
        "made for images of 65 patches (with the class token), the model takes 17 and texts of 16 tokens, the "
        "model takes 77: its positional embeddings are interpolated"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_any_float_dtype_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    model = ModelConfig(name=tiny.write_model(tmp_path / "model"))
    state = {name: tensor.to(dtype) for name, tensor in changed_weights(model).items()}
    towers.save(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "model.pt")
    for file in ("model.safetensors", "model.pt"):
        actual = loaded(model, tmp_path / file)
        assert_equal(actual, {name: tensor.float() for name, tensor in state.items()})
        assert {tensor.dtype for tensor in actual.values()} == {torch.float32}


class Net(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def foreign(folder: Path) -> dict[str, str]:
    """Files of other tools, by name, with the expected message."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(folder / "jit.pt"))
    torch.save(Net(), folder / "module.pt")
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, folder / "args.pt")
    torch.save(Net(), folder / "old.bin", _use_new_zipfile_serialization=False)
    (folder / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    (folder / "page.pt").write_text("<!DOCTYPE html><html></html>")
    (folder / "nothing.pt").write_bytes(b"")
    towers.save({"vision_model.embeddings.weight": torch.ones(2)}, folder / "hf.safetensors")
    torch.save({"vision_model.embeddings.weight": torch.ones(2)}, folder / "pytorch_model.bin")
    towers.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, folder / "head.safetensors")
    towers.save({"visual.a.lora_A": torch.ones(2, 3)}, folder / "adapter.safetensors")
    (folder / "renamed.safetensors").write_bytes((folder / "args.pt").read_bytes())
    with zipfile.ZipFile(folder / "some.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    return {
        "jit.pt": "it is a TorchScript archive, as OpenAI publishes its models; save its tensors once: ",
        "module.pt": "it is a pickle of Python objects (test_load_weights.Net), not only tensors; it is not",
        "args.pt": "it is a training checkpoint with its command line (argparse.Namespace) inside; it is not",
        "old.bin": "it is an old pickle that holds more than tensors; it is not executed here; if you",
        "lfs.safetensors": "it is a Git LFS pointer and not the weights; run `git lfs pull`",
        "config.json": "it is JSON text, such as a model's config; name the file of weights next to it",
        "page.pt": "it is a web page, as a failed download leaves it; download the file again",
        "nothing.pt": "it is an empty file; copy it again",
        "hf.safetensors": "it is weights in transformers' format; name their folder",
        "pytorch_model.bin": "it is weights in transformers' format; name their folder",
        "head.safetensors": "it is a classification head; name the model.safetensors next to it",
        "adapter.safetensors": "it is LoRA adapters; name weights that have them merged, such as the model",
        "renamed.safetensors": "it is a training checkpoint with its command line (argparse.Namespace) inside",
        "some.zip": "it is a zip archive that torch.save did not write; unpack it and name the file of weights",
    }


def test_files_of_other_tools_are_identified(tmp_path: Path) -> None:
    model = ModelConfig(name=tiny.write_model(tmp_path / "model"))
    built = towers.create(model)
    (tmp_path / "files").mkdir()
    for name, words in foreign(tmp_path / "files").items():
        with pytest.raises(ConfigError) as caught:
            load_into(built, model, tmp_path / "files" / name)
        message = str(caught.value)
        assert words in message, name
        assert "\n" not in message
        assert "weights_only" not in message


def run(trees: list[dict[str, Any]]) -> None:
    from dive_fast.checkpoint import saver
    from dive_fast.distributed import join
    from dive_fast.training import loop as train

    ranks, save = join(), saver.Saver.save

    def save_twice(self: saver.Saver, step: int, *args: Any, **kwargs: Any) -> None:
        save(self, step, *args, **kwargs)
        self._engine.deepspeed.save_checkpoint(str(self._folder.with_name("deepspeed")), tag=f"step{step}")

    saver.Saver.save = save_twice  # type: ignore[method-assign]
    for tree in trees:
        train.train(RunConfig.model_validate_json(json.dumps(tree)), Path(tree["train"]["output"]), ranks)


@pytest.mark.slow
def test_checkpoint_weights_equal_the_exported_ones(tmp_path: Path) -> None:
    trees = []
    for stage in (0, 2, 3):
        tree = tiny.write_config(tmp_path / str(stage), max_steps=2)
        tree["deepspeed"]["zero_optimization"]["stage"] = stage
        trees.append(tree)
    run_ranks(2, run, trees, init=False, timeout=240)
    for tree in trees:
        folder, model = Path(tree["train"]["output"]), ModelConfig(name=tree["model"]["name"])
        for checkpoint in ("checkpoints/step00000002", "deepspeed/step2"):
            assert_equal(loaded(model, folder / checkpoint), load_file(folder / "model.safetensors"))
