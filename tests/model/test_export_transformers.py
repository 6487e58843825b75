"""`dive-fast export --to transformers`: the same model in transformers, or a refusal that names the reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import transformers_models as foreign
from distributed import run_script
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor, SiglipModel

from dive_fast.commands.console import main
from dive_fast.config.schema import ModelConfig
from dive_fast.model import export_transformers
from dive_fast.model.huggingface import siglip_tower
from dive_fast.model.towers import create, tokenizer_of, unit

ROOT = Path(__file__).parents[2]
PHOTO = tiny.jpeg(3, size=(90, 60))


def export(model: Path | str, output: Path, *options: str) -> int:
    return main(["export", "--to", "transformers", *options, str(model), str(output)])


def error_of(model: Path | str, output: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert export(model, output, *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_foreign_model_comes_back_bit_for_bit(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "model", tmp_path / "exported"
    model = foreign.write(folder, kind)
    assert export(folder, output) == 0
    assert (
        f"{output}: {type(model).__name__}, read back; features and logits differ by at" in capsys.readouterr().out
    )
    before, after = (load_file(path / "model.safetensors") for path in (folder, output))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = AutoModel.from_pretrained(output)
    assert type(again) is type(model)
    for section in ("vision_config", "text_config"):
        expected, actual = (getattr(each.config, section).to_dict() for each in (model, again))
        unused = (
            "dtype",
            "bos_token_id",
            "pad_token_id",
            *(() if "projection_size" not in actual else ("eos_token_id",)),
        )
        different = {key for key in expected if expected[key] != actual.get(key) and key not in unused}
        assert different <= {"projection_dim"}  # of the sections, which CLIPModel does not read


@torch.no_grad()
def test_open_clip_model_gives_equal_logits_in_transformers(tmp_path: Path) -> None:
    folder, output = tmp_path / "model", tmp_path / "exported"
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    tiny.write_model(folder, tiny.reduced("ViT-B-32-quickgelu"), 1, preprocess)
    assert export(folder, output) == 0
    texts = ["A photo of a CAT.", "two dogs &  a Café"]
    model, processor = CLIPModel.from_pretrained(output), CLIPProcessor.from_pretrained(output)
    assert processor.tokenizer.model_max_length == 77
    config = ModelConfig(name=f"local-dir:{folder}")
    ours = create(config).eval()
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    image = Image.open(tmp_path / "photo.jpg")
    inputs = processor(text=texts, images=image, padding=True, return_tensors="pt")
    pixels = tiny.shown(ours.preprocess, image)[None]
    assert torch.allclose(inputs.pixel_values, pixels, rtol=0, atol=4 / 255 / 0.2)
    inputs["pixel_values"] = pixels
    logits = ours.scale() * unit(ours.encode_image(pixels)) @ unit(ours.encode_text(tokenizer_of(config)(texts))).T
    assert torch.allclose(model(**inputs).logits_per_image, logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_siglip_of_open_clip_keeps_its_activation_and_cleaning(tmp_path: Path) -> None:
    folder, output = tmp_path / "model", tmp_path / "exported"
    config = tiny.reduced("ViT-B-16-SigLIP") | {"embed_dim": 32}
    tower = siglip_tower.ImageTower(32, 8, 32, 2, 2, 128, "gelu", 1e-6)
    siglip_tower.register(tower.name)
    config["vision_cfg"] |= {"timm_model_name": tower.name, "image_size": 32}
    tiny.write_tokenizer(folder)
    squash = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    tiny.write_model(folder, config, 0, squash)
    assert export(folder, output) == 0
    model, processor = SiglipModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert (model.config.vision_config.hidden_act, model.config.text_config.hidden_act) == ("gelu", "gelu")
    text = "The photo, of_a DOG!"
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([text])
    assert tokens[0, :6].tolist() == [5, 6, 7, 4, 9, foreign.EOS]
    theirs = processor.tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(tokens, theirs)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "resnet": (
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        {},
        {},
        "vision_cfg.layers = [1, 1, 1, 1]: the image tower is a ResNet",
    ),
    "timm": (
        {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": "linear"},
        {},
        {},
        "the image tower does not pool like SigLIP",
    ),
    "timm's resnet": (
        {"timm_model_name": "test_resnet", "image_size": 160, "timm_pool": "avg", "timm_proj": "linear"},
        {},
        {},
        "the image tower is timm's ResNet",
    ),
    "not square": ({"image_size": [32, 48]}, {}, {}, "vision_cfg.image_size = [32, 48] is not one number"),
    "pool": ({"attentional_pool": True}, {}, {}, "no counterpart of vision_cfg.attentional_pool = true"),
    "layer scale": ({}, {"ls_init_value": 0.1}, {}, "no counterpart of text_cfg.ls_init_value = 0.1"),
    "two": ({}, {"pool_type": "eos", "eos_id": 2}, {}, "text_cfg.eos_id = 2: for this number, transformers'"),
    "last token": ({}, {"pool_type": "last"}, {}, "text_cfg.pool_type = last: transformers' CLIP reads"),
    "no causal mask": ({}, {"no_causal_mask": True}, {}, "no counterpart of text_cfg.no_causal_mask = true"),
    "random filter": ({}, {}, {"interpolation": "random"}, "preprocess_cfg.interpolation = random"),
    "borders": ({}, {}, {"resize_mode": "longest"}, "preprocess_cfg.resize_mode = longest has no counterpart"),
    "cleaning": (
        {},
        {"tokenizer_kwargs": {"clean": "canonicalize"}},
        {},
        "transformers' tokenizer splits 'a photo of a cat.' differently",
    ),
}
"""(vision_cfg, text_cfg, preprocess_cfg, message) of models without counterpart."""


@pytest.mark.parametrize("kind", REFUSED)
def test_model_without_counterpart_is_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    vision, text, preprocess, message = REFUSED[kind]
    config = {"embed_dim": 24, "vision_cfg": tiny.VISION | vision, "text_cfg": tiny.TEXT | text}
    tiny.write_model(tmp_path / "model", config, 0, preprocess or None)
    capsys.readouterr()
    assert message in error_of(tmp_path / "model", tmp_path / "exported", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_logit_bias_without_siglip_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_model(tmp_path / "model", tiny.CLIP | {"init_logit_bias": -10})
    capsys.readouterr()
    assert "no counterpart of logit_bias = true" in error_of(tmp_path / "model", tmp_path / "exported", capsys)


def test_wrong_weights_never_get_the_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export_transformers._state

    def changed(*arguments: Any) -> dict[str, Tensor]:
        state = original(*arguments)
        name = "vision_model.encoder.layers.1.mlp.fc2.bias"
        return state | {name: state[name] + 1e-3 * torch.arange(32)}

    monkeypatch.setattr(export_transformers, "_state", changed)
    tiny.write_model(tmp_path / "model")
    capsys.readouterr()
    assert "features or logits differ by" in error_of(tmp_path / "model", tmp_path / "exported", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_mistakes_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "exported"
    assert "is not a model: it has neither open_clip_config.json nor" in error_of(
        tmp_path / "empty", output, capsys
    )
    assert "exists: name a new folder" in error_of("demo", tmp_path / "empty", capsys)
    assert "open_clip has no model ViT-B-99" in error_of("ViT-B-99", output, capsys)
    assert "openai-x is no known tag" in error_of("ViT-B-32", output, capsys, "--pretrained", "openai-x")


def test_image_tower_has_the_sizes_of_its_name() -> None:
    tower = siglip_tower.ImageTower(40, 8, 48, 3, 6, 101, "quick_gelu", 1.5e-5)
    siglip_tower.register(tower.name)
    siglip_tower.register(tower.name)
    import timm

    assert siglip_tower.read(timm.create_model(tower.name)) == tower
    with pytest.raises(ValueError, match="is incomplete"):
        siglip_tower.register(f"{siglip_tower.PREFIX}i32")
    published = siglip_tower.ImageTower(256, 32, 768, 12, 12, 3072, "gelu_pytorch_tanh", 1e-6)
    assert published.name == "vit_base_patch32_siglip_256"
    with torch.device("meta"):
        assert siglip_tower.read(timm.create_model(published.name, num_classes=0)) == published


def tune(folder: Path, kind: str, objective: str, *options: str) -> None:
    """Writes a model of transformers into ``foreign`` and runs a config that starts from it."""
    foreign.write(folder / "foreign", kind)
    tree = tiny.write_config(folder, max_steps=2)
    shutil.rmtree(folder / "model")
    tree |= {"model": {"name": f"hf:{folder / 'foreign'}"}, "objective": {"name": objective}}
    if objective == "vanilla_ft":
        del tree["data"]["reference"]
    (folder / "config.json").write_text(json.dumps(tree))
    arguments = ("launch/train.py", "--config", str(folder / "config.json"), *options)
    run = run_script(*arguments, cwd=ROOT, environment={"DS_ACCELERATOR": "cpu"})
    assert run.returncode == 0, run.stderr


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: load_file(folder / name / "model.safetensors") for name in ("foreign", "exported")}


def test_tuned_model_comes_back_with_untrained_tensors_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(tmp_path, "quick gelu", "vanilla_ft")
    assert export(tmp_path / "run", tmp_path / "exported") == 0
    assert "the trained head, is not exported" in capsys.readouterr().out
    before, after = tensors(tmp_path).values()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "vision_model.encoder.layers.0.mlp.fc1.weight" in changed
    assert all(name.startswith("vi") for name in changed)  # the image tower and its projection


@pytest.mark.slow
def test_tuned_siglip_comes_back(tmp_path: Path) -> None:
    tune(tmp_path, "siglip", "dive")
    assert export(tmp_path / "run", tmp_path / "exported") == 0
    before, after = tensors(tmp_path).values()
    assert {name for name, tensor in before.items() if torch.equal(tensor, after[name])} == {"logit_bias"}


@pytest.mark.slow
def test_plan_of_a_foreign_model_needs_no_weights(tmp_path: Path) -> None:
    tune(tmp_path, "siglip", "dive", "--dry-run")
    assert not (tmp_path / "run").exists()
