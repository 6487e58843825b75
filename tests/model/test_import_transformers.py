"""Models of transformers as `model.name = hf:...`: equal features, every form of weights, and refused fields."""

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
import transformers_models as foreign
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from dive_fast.config.schema import ModelConfig
from dive_fast.data.prompts import pack
from dive_fast.errors import ConfigError
from dive_fast.model import towers
from dive_fast.model.model_identity import model_identity
from dive_fast.model.towers import create, tokenizer_of, unit

TEXTS = ["a cat", "the photo of a dog", "dog", "", "a photo of the cat of the dog " * 5]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and model of transformers by kind."""
    root = tmp_path_factory.mktemp("foreign")
    folders = {kind: root / f"model{row}" for row, kind in enumerate(foreign.KINDS)}
    return {kind: (folder, foreign.write(folder, kind)) for kind, folder in folders.items()}


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(name=f"hf:{folder}")


@pytest.fixture
def folder(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> Path:
    """A copy of a CLIP model with its own words."""
    return Path(shutil.copytree(models["tanh, own words"][0], tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def refusal(config: ModelConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        create(config)
    message = str(caught.value)
    assert message.startswith("model: cannot load hf:")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", foreign.KINDS)
@torch.no_grad()
def test_features_and_logits_equal_transformers(models: dict[str, tuple[Path, Any]], kind: str) -> None:
    folder, model = models[kind]
    ours, tokenizer = create(config_of(folder)).eval(), tokenizer_of(config_of(folder))
    images = torch.randn(len(TEXTS), 3, *ours.preprocess.size)
    tokens = tokenizer(TEXTS)
    image, text = ours.encode_image(images), ours.encode_text(tokens)
    expected = model(input_ids=tokens, pixel_values=images)
    assert torch.allclose(unit(image), expected.image_embeds, rtol=0, atol=1e-6)
    assert torch.allclose(unit(text), expected.text_embeds, rtol=0, atol=1e-6)
    assert torch.allclose(image, model.get_image_features(images).pooler_output, rtol=0, atol=1e-5)
    bias = 0.0 if ours.logit_bias is None else ours.logit_bias
    logits = ours.scale() * unit(image) @ unit(text).T + bias
    assert torch.allclose(logits, expected.logits_per_image, rtol=0, atol=1e-5)
    # Texts as transformers' own tokenizer prepares them: padded together with a mask, and alone without padding.
    theirs, context = AutoTokenizer.from_pretrained(folder), int(tokens.shape[1])
    if model.config.model_type == "clip":
        padded = theirs(TEXTS, padding=True, truncation=True, max_length=context, return_tensors="pt")
        alone = theirs(TEXTS[:1], return_tensors="pt")
        assert alone.input_ids.shape[1] < context
        assert torch.allclose(text[:1], model.get_text_features(**alone).pooler_output, rtol=0, atol=1e-5)
        length = pack(tokens, ours.pooled_at).length
        assert torch.allclose(text, ours.encode_text(tokens, length), rtol=0, atol=1e-5)
    else:
        padded = theirs(TEXTS, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        assert torch.equal(padded.input_ids, tokens)
        padded = {"input_ids": padded.input_ids}  # SigLIP has no mask
    assert torch.allclose(text, model.get_text_features(**padded).pooler_output, rtol=0, atol=1e-5)


def test_tokenizer_is_clips_bpe_only_where_tokens_are_equal(models: dict[str, tuple[Path, Any]]) -> None:
    config = config_of(models["quick gelu"][0])
    tokenizer: Any = tokenizer_of(config)
    assert isinstance(tokenizer, open_clip.SimpleTokenizer)
    assert tokenizer(["a cat"]).shape == (1, 20)
    assert tokenizer_of(config, 9)(["a cat"]).shape == (1, 9)
    assert "hf_tokenizer_name" not in (create(config).model_cfg or {})["text_cfg"]
    words: Any = tokenizer_of(config_of(models["siglip"][0]))
    assert words(["a cat"])[0, :3].tolist() == [4, 8, foreign.EOS]


@pytest.mark.parametrize("kind", ["quick gelu", "siglip"])
def test_pixels_equal_the_image_processor(models: dict[str, tuple[Path, Any]], tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(models[kind][0], tmp_path / "model"))
    changes = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3], "resample": 2}
    edit(folder / "preprocessor_config.json", lambda tree: tree.update(changes))
    preprocess = create(config_of(folder)).preprocess
    assert preprocess.interpolation == "bilinear"
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for size in ((80, 40), (40, 72), (33, 33)):
        coarse = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size)
        theirs = torch.as_tensor(processor(images=image, return_tensors="pt").pixel_values[0])
        assert torch.allclose(tiny.shown(preprocess, image), theirs, rtol=0, atol=1e-5)


def test_unnormalised_pixels_and_sections_of_a_processor_are_read(folder: Path) -> None:
    fields = json.loads((folder / "preprocessor_config.json").read_text()) | {"do_normalize": False}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    preprocess = create(config_of(folder)).preprocess
    assert (preprocess.mean, preprocess.std) == ((0, 0, 0), (1, 1, 1))


# Files


def shards(folder: Path, state: dict[str, Tensor]) -> None:
    names = sorted(state)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_positions(folder: Path, state: dict[str, Tensor]) -> None:
    positions = {"text_model.embeddings.position_ids": torch.arange(20)[None]}
    save_file(state | positions, folder / "model.safetensors")


FORMS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "shards": shards,
    "pickled": lambda folder, state: torch.save(state, folder / "pytorch_model.bin"),
    "with position numbers": with_positions,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_weights_give_the_same_model(folder: Path, form: str) -> None:
    expected = create(config_of(folder)).state_dict()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    FORMS[form](folder, state)
    again = create(config_of(folder)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_half_precision_weights_are_read_in_fp32(folder: Path) -> None:
    state = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    weight = create(config_of(folder)).text.token_embedding.weight
    assert torch.equal(weight, state["text_model.embeddings.token_embedding.weight"].float())


class Code:
    """A pickle of it would run a function when it is read."""

    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_pickled_code_is_not_executed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Code()}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read without executing code" in refusal(config_of(folder))
    assert "executed" not in capsys.readouterr().out


def test_code_of_a_folder_is_not_executed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor")
    automatic = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for file, changes in (
        ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": automatic}),
        ("preprocessor_config.json", {"image_processor_type": "Evil", "auto_map": automatic}),
        ("config.json", {"auto_map": automatic, "trust_remote_code": True}),
    ):
        content = (folder / file).read_text()
        edit(folder / file, lambda tree, changes=changes: tree.update(changes))
        with suppress(ConfigError):
            create(config_of(folder))
        (folder / file).write_text(content)
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "modules").exists()


def test_model_is_read_from_the_cache_of_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    foreign.put_into_cache(folder, tmp_path / "hub", "someone/some-clip")
    config = ModelConfig(name="hf:someone/some-clip")
    model = create(config)
    assert model_identity(model)["weights"] == model_identity(create(config_of(folder)))["weights"]
    assert model.model_cfg is not None
    assert model.model_cfg["text_cfg"]["hf_tokenizer_name"] == "someone/some-clip"
    message = refusal(ModelConfig(name="hf:someone/missing"))
    assert message.endswith("does not have it; HF_HUB_OFFLINE forbids the download")
    foreign.put_into_cache(folder, tmp_path / "hub", "someone/no-weights", ("model.safetensors",))
    assert "no weights in" in refusal(ModelConfig(name="hf:someone/no-weights"))


def test_identity_has_no_path_and_sees_weights_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    before = model_identity(create(config_of(folder)))
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert model_identity(create(config_of(moved))) == before
    assert str(tmp_path) not in json.dumps(before)
    text = (moved / "tokenizer.json").read_text()
    (moved / "tokenizer.json").write_text(text.replace('"cat": 8', '"cow": 8'))
    after = model_identity(create(config_of(moved)))
    assert after["weights"] == before["weights"]
    assert after["architecture"] != before["architecture"]


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_run_folder_of_a_foreign_model_is_a_model(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, kind: str
) -> None:
    config = config_of(models[kind][0])
    model = create(config)
    towers.save_description(model, tmp_path)
    towers.save(model.export(model.state_dict()), tmp_path / "model.safetensors")
    run = ModelConfig(name=f"local-dir:{tmp_path}")
    again, plain = create(run), open_clip.create_model(run.name)
    assert again.preprocess == model.preprocess
    assert model_identity(again)["weights"] == model_identity(model)["weights"]
    assert torch.equal(tokenizer_of(run)(TEXTS), tokenizer_of(config)(TEXTS))
    with torch.no_grad():
        images = torch.randn(2, 3, *model.preprocess.size)
        assert torch.equal(plain.eval().encode_image(images), model.eval().encode_image(images))
    weights = towers.read_weights(config, tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.export(model.state_dict()).items())


# Refusals

CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "naflex": ({"model_type": "siglip2"}, "model_type = siglip2: images of any size (NaFlex)"),
    "other model": ({"model_type": "blip"}, "model_type = 'blip' is not one of clip, siglip"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config: quantized weights"),
    "activation": ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act = relu is not one of"),
    "activations": (
        {"text_config": {"hidden_act": "quick_gelu"}},
        "text_config.hidden_act = quick_gelu: open_clip has QuickGELU in both towers or in none",
    ),
    "dropout": ({"text_config": {"attention_dropout": 0.1}}, "text_config.attention_dropout = 0.1: the towers"),
    "channels": ({"vision_config": {"num_channels": 4}}, "vision_config.num_channels = 4"),
    "two ends": ({"text_config": {"eos_token_id": [2, 3]}}, "text_config.eos_token_id = [2, 3] is not one token"),
    "absent end": (
        {"text_config": {"eos_token_id": 11}},
        "text_config.eos_token_id = 11, with which the tokenizer",
    ),
    "vocabulary": ({"text_config": {"vocab_size": 5}}, "and text_config.vocab_size is 5"),
    "image size": ({"vision_config": {"image_size": 48}}, "differs from the model's image_size = 48"),
    "rectangle": ({"vision_config": {"image_size": [32, 48]}}, "vision_config.image_size = [32, 48] is not one"),
    "projection": (
        {"projection_dim": 17},
        "text_projection.weight (open_clip's text.text_projection) is (32, 16)",
    ),
    "layers": ({"vision_config": {"num_hidden_layers": 3}}, "the weights lack 16 tensors of config.json"),
    "fewer layers": ({"text_config": {"num_hidden_layers": 1}}, "16 tensors have no counterpart in open_clip"),
}


@pytest.mark.parametrize("name", CONFIG)
def test_config_without_counterpart_is_refused_by_field(folder: Path, name: str) -> None:
    changes, expected = CONFIG[name]

    def change(tree: dict[str, Any]) -> None:
        for key, value in changes.items():
            tree[key] = tree[key] | value if key in ("vision_config", "text_config") else value

    edit(folder / "config.json", change)
    assert expected in refusal(config_of(folder))


PROCESSOR: dict[str, tuple[dict[str, Any], str]] = {
    "no resize": ({"do_resize": False}, "do_resize = false"),
    "scale": ({"rescale_factor": 0.5}, "rescale_factor = 0.5 is not 1/255"),
    "filter": ({"resample": 0}, "resample = 0 is neither bilinear (2) nor bicubic (3)"),
    "crop": ({"crop_size": {"height": 16, "width": 16}}, "crop_size = {'height': 16, 'width': 16} differs"),
    "edge": ({"size": {"shortest_edge": 36}}, "size.shortest_edge = 36: open_clip resizes the shorter side"),
    "no crop": ({"do_center_crop": False}, "do_center_crop = false with size.shortest_edge"),
    "other size": ({"size": {"height": 9, "width": 9}}, "size = {'height': 9, 'width': 9} is neither"),
    "kind": ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = ViTImageProcessor"),
}


@pytest.mark.parametrize("name", PROCESSOR)
def test_preprocessing_without_counterpart_is_refused_by_field(folder: Path, name: str) -> None:
    changes, expected = PROCESSOR[name]
    edit(folder / "preprocessor_config.json", lambda tree: tree.update(changes))
    message = refusal(config_of(folder))
    assert expected in message
    assert "preprocessor_config.json: " in message


def test_incomplete_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "folder not found" in refusal(config_of(tmp_path / "nothing"))
    for file, expected in (
        ("preprocessor_config.json", "no preprocessor_config.json, which says how images are preprocessed"),
        ("model.safetensors", "no weights in"),
        ("config.json", "has no config.json"),
    ):
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        assert expected in refusal(config_of(folder))
        (folder / file).write_bytes(content)
    (folder / "config.json").write_text('{"train": {}}')
    (folder / "open_clip_config.json").write_text("{}")
    assert "use local-dir:" in refusal(config_of(folder))
    config = ModelConfig(name=f"hf:{folder}", pretrained="openai")
    with pytest.raises(ConfigError, match="brings its own weights"):
        create(config)


def test_tokenizers_that_do_not_fit_are_refused(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    for change, expected in (
        ({"pad_token": None}, "pad_token is missing"),
        ({"padding_side": "left"}, "padding_side = left; it must be right"),
    ):
        file.write_text(json.dumps(copy.deepcopy(fields) | change))
        assert expected in refusal(config_of(folder))
    (folder / "tokenizer.json").unlink()
    file.unlink()
    assert "has no tokenizer: expected tokenizer.json" in refusal(config_of(folder))
    (folder / "tokenizer.json").write_text("{}")
    assert "cannot be loaded" in refusal(config_of(folder))


def test_siglip_without_pooling_is_refused(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["siglip"][0], tmp_path / "model"))
    edit(folder / "config.json", lambda tree: tree["text_config"].update(projection_size=48))
    assert "text_config.projection_size = 48 differs from vision_config.hidden_size = 32" in refusal(
        config_of(folder)
    )
    edit(folder / "config.json", lambda tree: tree["vision_config"].update(vision_use_head=False))
    assert "vision_config.vision_use_head = false" in refusal(config_of(folder))


def test_random_weights_need_no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    first, second = (create(ModelConfig(name=f"hf:{folder}", random=True)) for _ in range(2))
    assert model_identity(first) == model_identity(second)
