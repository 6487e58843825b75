"""Names and layouts of the tensors of a model in open_clip (CustomTextCLIP) and in transformers.

Both hold the same numbers: some matrices are transposed, some are parts of one tensor in the other library. A
conversion only moves numbers, so it is exact in both directions.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["equal", "transposed", "row"]
"""Relation of a tensor of open_clip to that of transformers: `row` has a first dimension of one more."""
Parts = tuple[tuple[str, int], ...]
"""Names of tensors, and how many parts of their common rows each one holds."""


@dataclass(frozen=True)
class Entry:
    """Tensors of open_clip and of transformers with the same numbers."""

    ours: Parts
    theirs: Parts
    form: Form = "equal"


def entries(family: str, image_layers: int, text_layers: int) -> list[Entry]:
    """All tensors of a model.

    Args:
        family: `clip` or `siglip`.
        image_layers: transformer blocks of the image tower.
        text_layers: transformer blocks of the text tower.
    """
    towers = _clip() if family == "clip" else _siglip()
    image = "visual.transformer.resblocks" if family == "clip" else "visual.trunk.blocks"
    blocks = [
        *_blocks(image, "vision_model", image_layers, _OPEN_CLIP if family == "clip" else _TIMM),
        *_blocks("text.transformer.resblocks", "text_model", text_layers, _OPEN_CLIP),
    ]
    return [*towers, *blocks]


def to_open_clip(state: Mapping[str, Tensor], table: Iterable[Entry]) -> dict[str, Tensor]:
    """Converts a state dict of transformers, which has all tensors of the table."""
    converted: dict[str, Tensor] = {}
    for entry in table:
        tensor = _joined(state, entry.theirs)
        if entry.form == "transposed":
            tensor = tensor.T
        converted.update(_split(tensor[None] if entry.form == "row" else tensor, entry.ours))
    return converted


def to_transformers(state: Mapping[str, Tensor], table: Iterable[Entry]) -> dict[str, Tensor]:
    """Converts a state dict of open_clip, which has all tensors of the table."""
    converted: dict[str, Tensor] = {}
    for entry in table:
        tensor = _joined(state, entry.ours)
        if entry.form == "transposed":
            tensor = tensor.T
        converted.update(_split(tensor[0] if entry.form == "row" else tensor, entry.theirs))
    return converted


def _joined(state: Mapping[str, Tensor], parts: Parts) -> Tensor:
    return state[parts[0][0]] if len(parts) == 1 else torch.cat([state[name] for name, _ in parts])


def _split(tensor: Tensor, parts: Parts) -> Iterator[tuple[str, Tensor]]:
    if len(parts) == 1:
        yield parts[0][0], tensor.contiguous()
        return
    unit = len(tensor) // sum(count for _, count in parts)
    pieces = tensor.split([unit * count for _, count in parts])
    for (name, _), piece in zip(parts, pieces, strict=True):
        yield name, piece.clone()


def _one(ours: str, theirs: str, form: Form = "equal") -> Entry:
    return Entry(((ours, 1),), ((theirs, 1),), form)


def _layer(ours: str, theirs: str) -> list[Entry]:
    """A linear layer or a norm."""
    return [_one(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "attn.in_proj_": "self_attn",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM = {
    "norm1": "layer_norm1",
    "attn.qkv.": "self_attn",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Layers of a block; the second one holds queries, keys and values in one tensor."""


def _blocks(ours: str, theirs: str, count: int, layers: Mapping[str, str]) -> Iterator[Entry]:
    for number in range(count):
        for our_layer, their_layer in layers.items():
            our_name = f"{ours}.{number}.{our_layer}"
            their_name = f"{theirs}.encoder.layers.{number}.{their_layer}"
            if their_layer != "self_attn":
                yield from _layer(our_name, their_name)
                continue
            for kind in ("weight", "bias"):
                parts = tuple((f"{their_name}.{part}_proj.{kind}", 1) for part in "qkv")
                yield Entry(((f"{our_name}{kind}", 3),), parts)


def _text() -> list[Entry]:
    return [
        _one("logit_scale", "logit_scale"),
        _one("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        _one("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
        *_layer("text.ln_final", "text_model.final_layer_norm"),
    ]


def _clip() -> list[Entry]:
    vision = "vision_model"
    return [
        *_text(),
        _one("text.text_projection", "text_projection.weight", "transposed"),
        _one("visual.class_embedding", f"{vision}.embeddings.class_embedding"),
        _one("visual.conv1.weight", f"{vision}.embeddings.patch_embedding.weight"),
        _one("visual.positional_embedding", f"{vision}.embeddings.position_embedding.weight"),
        *_layer("visual.ln_pre", f"{vision}.pre_layrnorm"),
        *_layer("visual.ln_post", f"{vision}.post_layernorm"),
        _one("visual.proj", "visual_projection.weight", "transposed"),
    ]


def _siglip() -> list[Entry]:
    trunk, vision = "visual.trunk", "vision_model"
    pool, head = f"{trunk}.attn_pool", f"{vision}.head"
    queries = [
        Entry(((f"{pool}.q.{kind}", 1), (f"{pool}.kv.{kind}", 2)), ((f"{head}.attention.in_proj_{kind}", 3),))
        for kind in ("weight", "bias")
    ]
    return [
        *_text(),
        _one("logit_bias", "logit_bias"),
        *_layer("text.text_projection", "text_model.head"),
        *_layer(f"{trunk}.patch_embed.proj", f"{vision}.embeddings.patch_embedding"),
        _one(f"{trunk}.pos_embed", f"{vision}.embeddings.position_embedding.weight", "row"),
        *_layer(f"{trunk}.norm", f"{vision}.post_layernorm"),
        _one(f"{pool}.latent", f"{head}.probe"),
        *queries,
        *_layer(f"{pool}.proj", f"{head}.attention.out_proj"),
        *_layer(f"{pool}.norm", f"{head}.layernorm"),
        *_layer(f"{pool}.mlp.fc1", f"{head}.mlp.fc1"),
        *_layer(f"{pool}.mlp.fc2", f"{head}.mlp.fc2"),
    ]
