"""Unimodal encoders of timm and transformers: features by their definition, identities, errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, CLIPConfig, CLIPModel

from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError
from dive_fast.evaluation.shift.encoders import CentralCrop, ImageEncoder, TextEncoder, UnimodalEncoder

CPU = torch.device("cpu")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TEXTS = ["two things", "a dog and a cat in the picture", "things"]


def write_vit(folder: Path, seed: int = 0, **cfg: Any) -> Any:
    """A small image transformer of timm with a head, in the layout of the hub."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SIZES).eval()
    model.pretrained_cfg.update({"input_size": (3, 32, 32), **cfg})
    save_for_hf(model, folder, model_args=SIZES)
    return model


def write_bert(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A small BERT for masked words, which has no pooler, with its tokenizer."""
    tiny.write_spelling_tokenizer(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tiny.PIECES),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=30,
        pad_token_id=0,
    )
    model = BertForMaskedLM(config).to(dtype).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    folder.mkdir()
    write_bert(folder)
    return folder


@pytest.mark.parametrize("crop", [{"crop_pct": 0.9}, {"crop_pct": 1.0, "crop_mode": "squash"}])
def test_image_features_are_means_of_tokens(tmp_path: Path, crop: dict[str, Any]) -> None:
    model = write_vit(tmp_path / "vit", **crop)
    encoder = ImageEncoder(str(tmp_path / "vit"))
    transform = create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg), is_training=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8))
    pixels = encoder.preprocess.to_tensor(encoder.preprocess.transform(image, None))
    torch.testing.assert_close(pixels, transform(image), rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = model.norm(model.blocks(model.pos_drop(model._pos_embed(model.patch_embed(pixels[None])))))
        torch.testing.assert_close(encoder(pixels[None]), expected.mean(1))
        assert expected.shape == (1, 17, encoder.width)


def test_view_of_a_crop_is_its_transform() -> None:
    preprocess = CentralCrop((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest", crop_share=0.875)
    for width, height in ((61, 45), (33, 90), (32, 32)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        view = preprocess.eval_view((height, width))
        (top, left), (rows, columns) = view.offset, view.size
        resized = image.resize(view.resized[::-1], view.resampling)
        shown = resized.crop((left, top, left + columns, top + rows))
        assert np.array_equal(np.asarray(shown), np.asarray(preprocess.transform(image, None)))
    assert "crop_share=0.875" in repr(preprocess)
    assert isinstance(preprocess, Preprocess)


def test_text_features_are_means_of_unpadded_tokens(bert: Path) -> None:
    encoder = TextEncoder(str(bert))
    model, tokenizer = AutoModel.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        together = encoder(TEXTS)
        for row, text in zip(together, TEXTS, strict=True):
            alone = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state
            torch.testing.assert_close(row, alone[0].mean(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(encoder(["dog " * 60])[0], encoder(["dog " * 70])[0])  # cut


def test_identity_holds_weights_and_preprocessing(tmp_path: Path, bert: Path) -> None:
    write_vit(tmp_path / "vit")
    identity = UnimodalEncoder(ImageEncoder(str(tmp_path / "vit")), TextEncoder(str(bert))).identity(CPU)
    # A drawn pooler is not part of it, nor the path.
    shutil.copytree(bert, tmp_path / "copy")
    torch.manual_seed(5)
    again = UnimodalEncoder(ImageEncoder(f"local-dir:{tmp_path / 'vit'}"), TextEncoder(str(tmp_path / "copy")))
    assert again.identity(CPU) == identity
    assert "mean" in json.dumps(identity["unimodal"]["text"]["pooling"])
    write_bert(bert, seed=1)
    assert TextEncoder(str(bert)).identity["weights"] != identity["unimodal"]["text"]["weights"]
    write_vit(tmp_path / "vit", crop_pct=0.8)
    other = ImageEncoder(str(tmp_path / "vit")).identity
    different = {key for key, value in other.items() if value != identity["unimodal"]["image"][key]}
    assert different == {"preprocess"}


def test_weights_in_16_bits_are_computed_in_32(tmp_path: Path, bert: Path) -> None:
    (tmp_path / "half").mkdir()
    write_bert(tmp_path / "half", dtype=torch.float16)
    encoder = TextEncoder(str(tmp_path / "half"))
    with torch.no_grad():
        features = encoder(TEXTS)
    assert features.dtype == torch.float32
    assert not torch.equal(features, features.half().float())


def test_wrong_encoders_are_refused(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, message in (
        (str(tmp_path / "none"), r"--image-encoder /.*/none: no such folder"),
        (str(tmp_path), "it has no config.json: name a folder written by timm.models.save_for_hf"),
        ("vit_tiny", "timm cannot load it: .*; without a connection, name a folder"),
        (str(bert), "timm cannot load it"),
    ):
        with pytest.raises(ConfigError, match=message):
            ImageEncoder(name)
    save_for_hf(timm.create_model("resnet10t", num_classes=0), tmp_path / "resnet")
    with pytest.raises(ConfigError, match=r"no tokens, .* but \(1, 512, .*name an image transformer, such as"):
        ImageEncoder(str(tmp_path / "resnet"))
    for name, message in (
        (str(tmp_path / "none"), "transformers cannot load it: folder not found"),
        (str(tmp_path), "transformers cannot load it: /.* has no config.json"),
        (
            str(tmp_path / "resnet"),
            "--text-encoder /.*: transformers cannot load it: /.*config.json is not the config",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            TextEncoder(name)
    state = BertForMaskedLM.from_pretrained(bert).state_dict()
    del state["bert.encoder.layer.1.output.dense.weight"]
    BertForMaskedLM.from_pretrained(bert).save_pretrained(bert, state_dict=state)
    with pytest.raises(
        ConfigError, match=r"its weights lack 1 tensors of the model, the first is encoder\.layer\.1"
    ):
        TextEncoder(str(bert))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPConfig(text_config=sizes | {"vocab_size": 60}, vision_config=sizes | {"image_size": 32})
    CLIPModel(clip).save_pretrained(bert)
    with pytest.raises(ConfigError, match=r"it does not encode a text: .*; name a text model, such as"):
        TextEncoder(str(bert))
