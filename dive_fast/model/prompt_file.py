"""Files of learned prompts: safetensors with the properties of the text tower that they fit."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, get_args

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dive_fast.data.text_tokenizer import TOKENIZER_PROBES, Tokenizer
from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import atomic_path
from dive_fast.io.safe_read import parse_json
from dive_fast.model.learned_prompts import (
    AttendsTo,
    LearnedPrompts,
    NameAttention,
    check_text_tower,
    token_table,
    tokenize_classes,
)
from dive_fast.model.towers import Towers

FILE = "prompts.safetensors"
"""Name of the prompts in a run folder."""
FORMAT = "dive_fast prompts 1"
"""Value of ``format`` in the metadata."""
ATTENDS_TO: tuple[AttendsTo, ...] = get_args(AttendsTo)
METADATA = "dive_fast"
"""Key of the metadata, a JSON object."""


KINDS: dict[str, tuple[type, ...]] = {
    **{"phrase": (str,), "heads": (int, type(None)), "residual": (bool, type(None)), "fit": (dict,)},
    **{"templates": (list,), "class_names": (list,)},
}
"""Types of the values of the metadata."""


class Fit(NamedTuple):
    """The properties of a text tower and its tokenizer that prompts depend on."""

    width: int
    """d, width of the token embeddings."""
    vocabulary: int
    """Number of different tokens."""
    context_length: int
    tokenizer: str
    """SHA-256 of the tokens of a few texts."""


NAMES = {
    "width": "text width",
    "vocabulary": "vocabulary size",
    "context_length": "context length",
    "tokenizer": "tokenizer",
}
"""The fields of :class:`Fit` in messages."""


class Origin(NamedTuple):
    """The origin of learned prompts, which they carry as ``origin``."""

    fit: Fit
    method: str
    """``objective.name``."""
    model: str
    """Name of the model that they were learned with."""
    weights: str
    """Digest of its weights (:func:`dive_fast.model.model_identity.weights_digest`)."""
    templates: tuple[str, ...]
    """The hand-made prompts of the training set."""
    class_names: tuple[str, ...]
    """Classes of the training set. The prompts depend on none: any other ones can be classified too."""


def fit_of(towers: Towers, tokenizer: Tokenizer) -> Fit:
    """The fit of a model.

    Raises:
        ConfigError: no prompts can be learned for its text tower.
    """
    check_text_tower(towers)
    tokens = tokenizer(list(TOKENIZER_PROBES))
    digest = hashlib.sha256(tokens.long().numpy().tobytes()).hexdigest()
    return Fit(token_table(towers).weight.shape[1], towers.vocabulary, tokens.shape[1], digest)


def save(prompts: LearnedPrompts, path: Path) -> None:
    """Writes prompts atomically, with their origin as metadata."""
    origin, attention = prompts.origin, prompts.attention
    assert isinstance(origin, Origin)
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in prompts.state_dict().items()}
    about = {
        "format": FORMAT,
        "class_independent": True,
        "phrase": prompts.phrase,
        "heads": None if attention is None else attention.heads,
        "residual": None if attention is None else attention.residual,
        "attends_to": None if attention is None else attention.attends_to,
        **origin._asdict(),
        "fit": origin.fit._asdict(),
    }
    with atomic_path(path) as partial:
        # One key: safetensors writes several in a random order.
        save_file(tensors, partial, {METADATA: json.dumps(about, ensure_ascii=False)})


def load(path: Path) -> LearnedPrompts:
    """Reads prompts that :func:`save` wrote, on the CPU and frozen, with their origin.

    Raises:
        ConfigError: the file cannot be read, or holds no prompts.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            about = parse_json((file.metadata() or {}).get(METADATA, "{}"))
    except Exception as error:  # safetensors raises errors of many types
        raise ConfigError(f"{path}: cannot be read as prompts in safetensors: {error}") from error
    try:
        if about["format"] != FORMAT:
            raise ValueError("another format")
        for key, kinds in KINDS.items():
            if type(about[key]) not in kinds:
                raise ValueError(f"{key} = {about[key]!r}")
        # Files of the first version lack it; their attention is to the name alone.
        attends_to = about.get("attends_to") or ATTENDS_TO[0]
        prompts = _prompts(tensors, about["phrase"], about["heads"], about["residual"], attends_to)
        prompts.origin = Origin(
            Fit(**about["fit"]),
            method=str(about["method"]),
            model=str(about["model"]),
            weights=str(about["weights"]),
            templates=tuple(map(str, about["templates"])),
            class_names=tuple(map(str, about["class_names"])),
        )
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{path}: not prompts of this version of dive_fast ({str(error).splitlines()[0]}); name the {FILE} of "
            "a run"
        ) from error
    return prompts


def _prompts(
    tensors: dict[str, Tensor], phrase: str, heads: int | None, residual: bool | None, attends_to: AttendsTo
) -> LearnedPrompts:
    attention = None
    if tensors["context"].ndim != 2:
        raise ValueError("context is not a matrix")
    if heads is not None:
        if heads < 1 or attends_to not in ATTENDS_TO:
            raise ValueError(f"heads = {heads}, attends_to = {attends_to}")
        attention = NameAttention(tensors["context"].shape[1], heads, bool(residual), attends_to=attends_to)
    prompts = LearnedPrompts(tensors["context"], phrase, attention)
    prompts.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return prompts.requires_grad_(False)


def attach(prompts: LearnedPrompts, path: Path, towers: Towers, tokenizer: Tokenizer) -> None:
    """Sets ``towers.prompts`` to prompts of a file, on the towers' device.

    Args:
        path: of the file, for messages.

    Raises:
        ConfigError: the prompts were learned for another text width, vocabulary, context length or tokenizer, or
            the file contradicts itself.
    """
    fit, origin = fit_of(towers, tokenizer), prompts.origin
    assert isinstance(origin, Origin)
    name = "this model" if towers.config is None else towers.config.name
    for key, here in fit._asdict().items():
        there = getattr(origin.fit, key)
        if there != here:
            numbers = "another one" if key == "tokenizer" else f"{there} there, {here} here"
            raise ConfigError(
                f"{path}: learned with {origin.model}, whose {NAMES[key]} is not that of {name} ({numbers}); "
                "these prompts fit only models with the same text width, vocabulary, tokenizer and context length"
            )
    tokens = tokenize_classes(tokenizer, towers.pooled_at, ["x"], prompts.phrase).context_tokens
    if tuple(prompts.context.shape) != (tokens, fit.width):
        raise ConfigError(
            f"{path}: its context has the shape {tuple(prompts.context.shape)}, and its phrase {prompts.phrase!r} "
            f"stands for {(tokens, fit.width)}: the file was changed; learn the prompts again"
        )
    towers.prompts = prompts.to(towers.logit_scale.device)
