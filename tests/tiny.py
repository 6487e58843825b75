"""Small models and data sets that tests build for themselves: real open_clip models, real files."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dive_fast.data.transforms import Crop, Preprocess

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
QUICKGELU = CLIP | {"quick_gelu": True}

SPELLING = "spelling"
"""Name of the tokenizer of :data:`FEW_TOKENS`; open_clip reads it from the folder of the model."""
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-_()"
PIECES = ["<pad>", "<start>", "<unk>", *CHARACTERS, *(f"##{character}" for character in CHARACTERS)]
WORDS_OF_TESTS = (
    "and birds blurry caption cat class dog in many number of on photo picture rather so the things tree two"
)
PIECES += [*WORDS_OF_TESTS.split(), "<end>"]
FEW_TOKENS: dict[str, Any] = CLIP | {"text_cfg": TEXT | {"vocab_size": len(PIECES), "hf_tokenizer_name": SPELLING}}
"""CLIP with a tokenizer that spells unknown words. The embeddings of CLIP's vocabulary would be 96 % of the
weights, which every step, checkpoint and export of a training handles."""


def write_model(
    folder: Path, config: dict[str, Any] = CLIP, seed: int = 0, preprocess: dict[str, Any] | None = None
) -> str:
    """An open_clip ``local-dir`` model with random weights; returns its ``model.name``."""
    folder.mkdir(parents=True, exist_ok=True)
    if config["text_cfg"].get("hf_tokenizer_name") == SPELLING:
        write_spelling_tokenizer(folder)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {"size": 32}})
    )
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def reduced(name: str) -> dict[str, Any]:
    """open_clip's own config of a model, as it is but for the sizes."""
    config: dict[str, Any] = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision |= {"timm_model_name": "test_vit", "image_size": 160}
        config["embed_dim"] = 64
    else:
        vision |= {"image_size": 2 * vision["patch_size"], "layers": 2, "width": 2 * vision.get("head_width", 64)}
        config["embed_dim"] = 24
    text |= {"layers": 2, "width": 32, "heads": 2}
    if "multimodal_cfg" in config:
        vision |= {"attn_pooler_heads": 2}
        config["multimodal_cfg"] |= {"layers": 1, "width": 24, "heads": 2, "attn_pooler_heads": 2}
    if "hf_tokenizer_name" in text:
        text["vocab_size"] = len(VOCABULARY)
    return config


def shown(preprocess: Preprocess, image: Image.Image, crop: Crop | None = None) -> torch.Tensor:
    """The view of an image, ``(3, H, W)``, as the plain loader makes it."""
    return preprocess.to_tensor(preprocess.transform(image, crop))


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "the", "photo", "of", "cat", "dog"]
VOCABULARY = {word: row for row, word in enumerate(WORDS)}


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face tokenizer of a few words that ends a text with ``</s>``."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", VOCABULARY["</s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write_spelling_tokenizer(folder: Path) -> None:
    """The tokenizer of :data:`FEW_TOKENS`, for which no two texts are the same.

    The end has the largest id, at which open_clip reads a text.
    """
    rows = {piece: row for row, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(WordPiece(rows, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    special = [(token, rows[token]) for token in ("<start>", "<end>")]
    tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": TEXT["context_length"]}
    names = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))


def jpeg(seed: int, size: tuple[int, int] = (40, 36), kind: str = "JPEG") -> bytes:
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    content = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(content, kind)
    return content.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A webdataset tar: ``{key: {suffix: content}}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, count: int, shard: int = 10) -> Path:
    """Tars of pictures of different sizes, labelled by fives and captioned."""
    samples = {
        f"{i:03d}": {
            "jpg": jpeg(i, size=(40 + i, 36)),
            "cls": str(i % 5).encode(),
            "txt": f"caption {i % 7}{' and so on' * (i % 3)}".encode(),
        }
        for i in range(count)
    }
    keys = list(samples)
    for number, first in enumerate(range(0, count, shard)):
        write_tar(folder / f"{number}.tar", {key: samples[key] for key in keys[first : first + shard]})
    return folder


def write_target(folder: Path, count: int = 24, classes: int = 5) -> dict[str, Any]:
    """A labelled webdataset; returns its ``data.target`` section."""
    samples = {f"{i:04d}": {"jpg": jpeg(i), "cls": str(i % classes).encode()} for i in range(count)}
    write_tar(folder / "shard-00000.tar", samples)
    (folder / "classes.txt").write_text("".join(f"class number {i}\n" for i in range(classes)))
    (folder / "templates.txt").write_text("a photo of a {}\na rather blurry picture of the {}.\n")
    return {
        "format": "webdataset",
        "path": str(folder),
        "class_names": str(folder / "classes.txt"),
        "templates": str(folder / "templates.txt"),
        "batch_size": 8,
        "workers": 0,
    }


def write_reference(folder: Path, count: int = 24) -> dict[str, Any]:
    """A captioned webdataset; returns its ``data.reference`` section."""
    samples = {
        f"{i:04d}": {"jpg": jpeg(1000 + i), "txt": f"caption {i}{' and so on' * (i % 5)}".encode()}
        for i in range(count)
    }
    write_tar(folder / "shard-00000.tar", samples)
    return {"format": "webdataset", "path": str(folder), "batch_size": 8, "workers": 0}


def write_config(folder: Path, **train: Any) -> dict[str, Any]:
    """A whole config over the above, for ``RunConfig.model_validate`` or a file."""
    return {
        "model": {"name": write_model(folder / "model", FEW_TOKENS)},
        "data": {"target": write_target(folder / "target"), "reference": write_reference(folder / "reference")},
        "train": {
            "output": str(folder / "run"),
            "epochs": 1,
            "precision": "fp32",
            "warmup_steps": 1,
            "learning_rate": 1e-3,
            "log_every": 1,
        }
        | train,
        "deepspeed": {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.0},
    }


EVALUATION = ("format", "path", "class_names", "templates")
"""The keys of a ``data.target`` section that an evaluation set has too."""
