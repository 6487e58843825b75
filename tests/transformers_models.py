"""Tiny random models of transformers in folders, as the hub has them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import tiny
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}
EOS = tiny.VOCABULARY["</s>"]
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "quick gelu": ({}, {"vocab_size": 49408, "eos_token_id": 2}, {"projection_dim": 24}),
    "gelu, first end": (
        {"hidden_act": "gelu", "num_attention_heads": 4, "image_size": 48, "layer_norm_eps": 1e-6},
        {"hidden_act": "gelu", "num_attention_heads": 1, "vocab_size": 49408, "eos_token_id": 49407},
        {"projection_dim": 40},
    ),
    "tanh, own words": (
        {"hidden_act": "gelu_pytorch_tanh", "intermediate_size": 85, "hidden_size": 48, "patch_size": 16},
        {"hidden_act": "gelu", "vocab_size": 12, "eos_token_id": EOS, "pad_token_id": 0, "layer_norm_eps": 1e-3},
        {"projection_dim": 16},
    ),
    "siglip": ({}, {"vocab_size": 12, "hidden_size": 48, "projection_size": 32}, {}),
    "siglip, other sizes": (
        {"image_size": 40, "num_attention_heads": 8, "intermediate_size": 97, "layer_norm_eps": 1e-5},
        {"vocab_size": 12, "hidden_act": "gelu", "max_position_embeddings": 9, "layer_norm_eps": 1e-5},
        {},
    ),
    "siglip, quick gelu": ({"hidden_act": "gelu"}, {"vocab_size": 12, "hidden_act": "quick_gelu"}, {}),
}
"""(vision_config, text_config, config) by kind."""


def write(folder: Path, kind: str, seed: int = 0) -> Any:
    """Writes a model with image processor and tokenizer; returns it."""
    vision, text, shared = KINDS[kind]
    is_clip = not kind.startswith("siglip")
    config = (CLIPConfig if is_clip else SiglipConfig)(
        vision_config=VISION | vision, text_config=TEXT | text, **shared
    )
    torch.manual_seed(seed)
    model = (CLIPModel if is_clip else SiglipModel)(config).eval()
    with torch.no_grad():  # transformers begins with zeros and ones, which would hide a mistake
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    size = config.vision_config.image_size
    square = {"height": size, "width": size}
    if is_clip:
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square).save_pretrained(folder)
    else:
        SiglipImageProcessor(size=square).save_pretrained(folder)
    if text["vocab_size"] == 49408:
        write_bpe(folder)
    else:
        tiny.write_tokenizer(folder)
    return model


def write_bpe(folder: Path) -> None:
    """CLIP's tokenizer, as openai/clip-vit-base-patch32 has it."""
    bpe = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): row for token, row in bpe.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in bpe.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def put_into_cache(folder: Path, cache: Path, repository: str, leave_out: tuple[str, ...] = ()) -> Path:
    """Copies files into the cache of the hub, as a download leaves them; returns the snapshot."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs/main").write_text("0" * 40)
    (root / "blobs").mkdir(exist_ok=True)
    for path in folder.iterdir():
        blob = root / "blobs" / f"{len(list((root / 'blobs').iterdir()))}"
        if path.name in leave_out:
            continue
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).unlink(missing_ok=True)
        (snapshot / path.name).symlink_to(blob)
    return snapshot
