"""Tokenizers: that of a folder of transformers in open_clip, and open_clip's in such a folder.

They are compared on probe texts, and never assumed to be equal.
"""

import json
import string
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, get_clean_fn

from dive_fast.data.text_tokenizer import TOKENIZER_PROBES

_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
"""Files that hold the vocabulary of a tokenizer."""
_PROBES = [*TOKENIZER_PROBES, "A photo of TWO dogs, isn't it?", "an e-mail: 3.5 x 10 (90%)"]


def describe(folder: Path, model_cfg: dict[str, Any], family: str, name: str) -> dict[str, str]:
    """The keys of ``text_cfg`` for the tokenizer in a folder: none if it is CLIP's BPE, which open_clip includes.

    Args:
        model_cfg: open_clip's architecture.
        family: `clip` or `siglip`.
        name: the value of ``hf_tokenizer_name`` for another tokenizer.

    Raises:
        ValueError: there is no tokenizer, or it does not fit the model.
    """
    text = model_cfg["text_cfg"]
    context, vocabulary = text["context_length"], text["vocab_size"]
    tokenizer = _load(folder)
    rows = _rows(tokenizer, context)
    largest = max(token for row in rows for token in row)
    if largest >= vocabulary:
        raise ValueError(f"the tokenizer has token {largest}, and text_config.vocab_size is {vocabulary}")
    if family == "clip" and rows == _simple_rows(context):
        return {}
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "tokenizer_config.json: pad_token is missing, and texts are padded to the model's context"
        )
    if tokenizer.padding_side != "right":
        raise ValueError(f"tokenizer_config.json: padding_side = {tokenizer.padding_side}; it must be right")
    eos = text.get("eos_id")
    if text.get("pool_type") == "eos" and not all(eos in row for row in rows):
        raise ValueError(f"text_config.eos_token_id = {eos}, with which the tokenizer does not end all texts")
    clean = get_clean_fn("whitespace")  # as HFTokenizer does
    if _rows(tokenizer, context, [clean(probe) for probe in _PROBES]) != rows:
        raise ValueError(
            "the tokenizer distinguishes white space or Unicode forms, which open_clip removes before it"
        )
    return {"hf_tokenizer_name": name}


def load(folder: Path, text_cfg: dict[str, Any], context: int | None) -> Any:
    """open_clip's tokenizer object for a model whose ``text_cfg`` has the keys of :func:`describe`."""
    context = context or text_cfg["context_length"]
    if "hf_tokenizer_name" in text_cfg:
        return HFTokenizer(str(folder), context_length=context)
    return open_clip.SimpleTokenizer(context_length=context)


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # Without them, transformers silently begins with an empty vocabulary.
    if not any(path.is_file() for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise ValueError(f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # transformers raises errors of many types
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


def _rows(tokenizer: Any, context: int, texts: list[str] = _PROBES) -> list[list[int]]:
    """Tokens without padding."""
    rows: list[list[int]] = tokenizer(texts, max_length=context, truncation=True)["input_ids"]
    return rows


def _simple_rows(context: int) -> list[list[int]]:
    # Without tensors, which have no values while a plan simulates a run.
    tokenizer = open_clip.SimpleTokenizer()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    return [[start, *tokenizer.encode(probe)[: context - 2], end] for probe in _PROBES]


def save(tokenizer: Any, context: int, folder: Path) -> None:
    """Writes the files of a tokenizer of open_clip, for transformers.

    Raises:
        ValueError: transformers' tokenizer would give other tokens, or has no counterpart.
    """
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        if tokenizer.reduction_fn is not None:
            raise ValueError("text_cfg.tokenizer_kwargs.reduction_mask has no counterpart")
        _write_bpe(tokenizer, context, folder)
        saved: Any = _load(folder)
    elif isinstance(tokenizer, HFTokenizer):
        if tokenizer.tokenizer_mode or tokenizer.strip_sep_token:
            raise ValueError("text_cfg: tokenizer_mode and strip_sep_token have no counterpart")
        saved = tokenizer.tokenizer
        _add_cleaning(saved, getattr(tokenizer.clean_fn, "__name__", ""))
        saved.model_max_length = context
    else:
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no counterpart")
    saved.save_pretrained(str(folder))
    _check(tokenizer, _load(folder), context)


def _write_bpe(tokenizer: Any, context: int, folder: Path) -> None:
    """Writes open_clip's BPE with the names that CLIPTokenizer has for the special tokens."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): row for token, row in tokenizer.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _add_cleaning(tokenizer: Any, cleaning: str) -> None:
    """Adds open_clip's cleaning of texts to the normalizer of a fast tokenizer of transformers."""
    from tokenizers import Regex, normalizers

    if cleaning == "_clean_whitespace":
        return  # ordinary texts are not changed; the probes are compared
    steps: list[Any] = [normalizers.Lowercase()]
    if cleaning == "_clean_canonicalize":
        punctuation = "".join(f"\\{mark}" for mark in string.punctuation if mark != "_")
        steps = [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{punctuation}]"), ""), *steps]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend = tokenizer.backend_tokenizer
    present = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, *present])


def _check(ours: Any, theirs: Any, context: int) -> None:
    """Compares tokens of the probes up to the padding.

    Raises:
        ValueError: they differ.
    """
    expected = ours(_PROBES, context_length=context)
    rows = _rows(theirs, context)
    for probe, row, tokens in zip(_PROBES, rows, expected, strict=True):
        padding = set(tokens[len(row) :].tolist())
        is_padded = len(padding) <= 1 and (not padding or padding <= {0, theirs.pad_token_id})
        if not torch.equal(tokens[: len(row)], torch.tensor(row)) or not is_padded:
            raise ValueError(
                f"transformers' tokenizer splits {probe[:40]!r} differently: {row[:8]}, "
                f"open_clip's {tokens[:8].tolist()}"
            )
