"""Class names and templates -> prompts; texts -> tokens, each distinct one once."""

import heapq
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor

from dive_fast.data.batch import Text
from dive_fast.data.random_streams import Draw, stream
from dive_fast.data.sources.source import Sample, Source, locate
from dive_fast.errors import DataError
from dive_fast.io.safe_read import parse_json, read_text

logger = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]
"""Texts -> ``(len, context)`` int64."""
PooledAt = Literal["argmax"] | int | None
"""Where a causal text tower reads its feature: at the largest token id, or at this one; tokens behind it change
nothing. None: the tower needs the whole context."""
TOKENIZER_PROBES = ("a photo of a cat.", "Größe: 10 µm, naïve café 東京", "", "word " * 100)
"""Texts by whose tokens tokenizers are told apart."""


class Template:
    """A prompt template: its text has ``{}`` in place of the class name."""

    def __init__(self, template: str) -> None:
        self.template = template

    def __call__(self, class_name: str) -> str:
        """The prompt of a class."""
        return self.template.replace("{}", class_name)


def read_class_names(name: str) -> tuple[str, ...]:
    """``imagenet`` (open_clip's), or a text file with one name a line, or with a JSON list of names.

    Raises:
        DataError: no such file, or an empty one, or one with an empty line among the names; or its lines are
            something else than names.
    """
    if name == "imagenet":
        return tuple(open_clip.IMAGENET_CLASSNAMES)
    text = _text(name, "class names")
    if text.lstrip()[:1] in ("[", "{"):
        return _json_list(name, text, "class name", "class names, in label order, or one name a line")
    lines = _lines(name, text, "class names")
    begins = _numbered(lines)
    if begins is not None:
        raise DataError(
            f"{name}: each line begins with {begins[0]}, which would be part of the class name "
            f"({begins[1][:40]!r}); keep the names alone"
        )
    _refuse_code(name, lines, "class name")
    return tuple(lines)


_NUMBERED = re.compile(r"(n[0-9]{8}|[0-9]+)\.?[\s:,;]")


def _numbered(lines: Sequence[str]) -> tuple[str, str] | None:
    """What each line of a table begins with, and the first such line; None: the lines are names."""
    for rows in (lines, lines[1:] if len(lines) > 2 else []):  # the first line of a table may be its header
        starts = [match[1] for match in map(_NUMBERED.match, rows) if match]
        if not rows or len(starts) < len(rows):
            continue
        if all(start.startswith("n") for start in starts):
            return "a WordNet id", rows[0]
        numbers = [int(start) for start in starts if start.isdecimal()]
        if numbers in (list(range(len(rows))), list(range(1, len(rows) + 1))):
            return "its number", rows[0]
    return None


def _refuse_code(name: str, lines: Sequence[str], what: str) -> None:
    """Refuses lines with the marks of a programming language or of YAML, which would be part of every prompt.

    Raises:
        DataError: all lines are quoted, or items of a list, or the first one is a comment.
    """
    if all(re.fullmatch(r"""(["']).*\1,?""", line) for line in lines):
        raise DataError(
            f"{name}: all lines are quoted, and the quotes would be part of each {what} ({lines[0][:40]!r}); "
            "remove them, or write a JSON list"
        )
    if all(line.startswith("- ") for line in lines):
        raise DataError(f"{name}: each line begins with '- ', which would be part of the {what}; remove it")
    if lines[0].startswith("#"):
        raise DataError(
            f"{name}: its first line is a comment, {lines[0][:40]!r}, which would be a {what}; remove it"
        )


def _json_list(name: str, text: str, what: str, several: str) -> tuple[str, ...]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise DataError(f"{name}: begins like JSON, and is none: {error}; expected one {what} a line") from error
    if not isinstance(found, list) or not found or not all(isinstance(own, str) and own.strip() for own in found):
        raise DataError(f"{name}: expected a JSON list of {several}")
    return tuple(own.strip() for own in found)


def read_templates(name: str, place: str = "") -> tuple[Template, ...]:
    """``imagenet`` or ``simple`` (open_clip's), a text file with one template a line, or one template.

    Args:
        place: the key of the config, for messages.

    Raises:
        DataError: no such file, or a template without ``{}``.
    """
    if name in ("imagenet", "simple"):
        shipped = {"imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        return tuple(Template(template("{}")) for template in shipped[name])
    try:
        lines = [name] if "{}" in name else _templates_in(name)
        for line in lines:
            if "{}" not in line:
                raise DataError(f"{name}: template {line!r} has no {{}} for the class name")
            if (other := re.search(r"\{\w+\}", line)) is not None:
                raise DataError(
                    f"{name}: template {line!r} has {other[0]}, which nothing fills; only {{}} is filled"
                )
    except DataError as error:
        raise DataError(f"{place}: {error}" if place else str(error)) from error
    return tuple(Template(line) for line in lines)


def _templates_in(name: str) -> Sequence[str]:
    if not name.startswith("demo:") and not locate(name).exists():
        raise DataError(
            f"{name}: no such file of templates; a template itself has {{}} in place of the class name"
        )
    text = _text(name, "templates")
    if text.lstrip().startswith("["):
        return _json_list(name, text, "template", "templates, or one a line")
    lines = _lines(name, text, "templates")
    _refuse_code(name, lines, "prompt")
    return lines


def check_labels(source: Source, class_names: Sequence[str]) -> None:
    """Holds every label to the class names.

    Raises:
        DataError: a label without a class name.
    """
    for sample in source.samples:
        if not 0 <= sample.label < len(class_names):
            raise DataError(
                f"{sample.path}: sample {sample.key} has label {sample.label}, "
                f"but there are {len(class_names)} class names"
            )


class PromptTable:
    """Every prompt of a target set, tokenised once."""

    def __init__(
        self, source: Source, class_names: Sequence[str], templates: Sequence[Template], tokenizer: Tokenizer
    ):
        """Takes the samples' own texts where they have any (CSV), else class names x templates.

        Raises:
            DataError: a label without a class name.
        """
        self._titles: dict[str, int] | None = None
        self._templates = len(templates)
        if any(sample.texts for sample in source.samples):
            prompts = list(dict.fromkeys(text for sample in source.samples for text in sample.texts))
            self._titles = {title: row for row, title in enumerate(prompts)}
        else:
            check_labels(source, class_names)
            prompts = [template(name) for name in class_names for template in templates]
            warn_about_prompts(class_names, templates, tokenizer)
        # int32: ImageNet's 80,000 prompts of 77 tokens are 25 MB, in every worker.
        self._tokens = torch.cat([tokenizer(prompts[i : i + 1024]).int() for i in range(0, len(prompts), 1024)])

    def draw(self, sample: Sample, index: int, seed: int, epoch: int) -> Tensor:
        """``(context,)``: the tokens of one of a sample's prompts, a pure function of (seed, sample, epoch)."""
        draw = float(stream(seed, Draw.PROMPT, index, epoch).random())
        if self._titles is not None:
            return self._tokens[self._titles[sample.texts[int(draw * len(sample.texts))]]]
        return self._tokens[sample.label * self._templates + int(draw * self._templates)]


def warn_about_prompts(class_names: Sequence[str], templates: Sequence[Template], tokenizer: Tokenizer) -> None:
    """Warns of prompts that are cut, and of classes whose prompts have equal tokens, by the longest template.

    Tokenizers cut a prompt to the model's context without a word, and with it the class name.
    """
    if not class_names or not templates:
        return
    template = max(templates, key=lambda own: len(own("")))
    prompts = [template(name) for name in class_names]
    parts = [prompts[first : first + 1024] for first in range(0, len(prompts), 1024)]
    tokens = torch.cat([tokenizer(part) for part in parts])
    longer = torch.cat([tokenizer([f"{prompt} and more" for prompt in part]) for part in parts])
    is_cut = (tokens == longer).all(1)
    if bool(is_cut.any()):
        first = prompts[int(is_cut.int().argmax())]
        warn_once(
            f"{int(is_cut.sum())} of {len(prompts)} classes have a prompt that fills the model's context of "
            f"{tokens.shape[1]} tokens, and is cut there: {first[:30]!r} ... {first[-30:]!r}; shorten the "
            "template or the name"
        )
    first_with: dict[bytes, str] = {}
    for name, row in zip(class_names, tokens.numpy(), strict=True):
        other = first_with.setdefault(row.tobytes(), name)
        if other != name:  # equal names have a remark of their own
            warn_once(
                f"classes {other[:40]!r} and {name[:40]!r} have a prompt of the same tokens: prompts cannot tell "
                "them apart, nor perhaps others"
            )
            return


def warn_about_truncated_captions(texts: Sequence[str], tokenizer: Tokenizer, name: str) -> None:
    """Warns of captions that are cut to the model's context: of up to 1024 of them, spread evenly.

    Args:
        name: of the set, for the message.
    """
    chosen = [texts[row] for row in range(0, len(texts), max(1, -(-len(texts) // 1024)))]
    if not chosen:
        return
    tokens, longer = tokenizer(chosen), tokenizer([f"{text} and more" for text in chosen])
    count = int((tokens == longer).all(1).sum())
    if count:
        warn_once(
            f"{name}: {count} of {len(chosen)} captions looked at fill the model's context of {tokens.shape[1]} "
            "tokens, and are cut there"
        )


@cache
def warn_once(message: str) -> None:
    """Warns of something once, by the first rank, however often it is met."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def pack(tokens: Tensor, pooled_at: PooledAt) -> Text:
    """Token rows ``(B, context)`` as the distinct texts of a batch."""
    distinct, index = torch.unique(tokens.long(), dim=0, return_inverse=True)
    length = distinct.shape[1]
    if pooled_at is not None:
        ends = distinct if pooled_at == "argmax" else (distinct == pooled_at).int()
        length = int(ends.argmax(1).max()) + 1
    return Text(distinct, index, length)


LONG_WORD = 64
"""Characters from which on :func:`quick_bpe` merges the pieces of a word."""


def quick_bpe(tokenizer: Any) -> Any:
    """open_clip's BPE tokenizer, with the same tokens, but in time n log n of a text without spaces.

    Its own takes the square: half a minute for 16,000 letters. Other tokenizers are returned as they are.
    """
    if isinstance(tokenizer, open_clip.SimpleTokenizer) and not isinstance(
        getattr(tokenizer, "bpe", None), _QuickBpe
    ):
        tokenizer.bpe = _QuickBpe(tokenizer)
    return tokenizer


class _QuickBpe:
    """Merges pairs by their rank, and among equal ones from the left.

    A pair that a merge has made has a later rank than the merge, as it was learned after it; so it does not matter
    that open_clip merges all equal pairs before it looks for the next.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._ranks: dict[tuple[str, str], int] = tokenizer.bpe_ranks
        self._own: Callable[[str], str] = tokenizer.bpe

    def __call__(self, token: str) -> str:
        """The pieces of a word, with spaces between."""
        if len(token) < LONG_WORD:
            return self._own(token)
        pieces = [*token[:-1], f"{token[-1]}</w>"]
        # A piece that was merged into the one before is empty.
        after = list(range(1, len(pieces) + 1))
        before = list(range(-1, len(pieces) - 1))
        waiting: list[tuple[int, int, str, str]] = []

        def wait(left: int) -> None:
            right = after[left]
            if right < len(pieces):
                rank = self._ranks.get((pieces[left], pieces[right]))
                if rank is not None:
                    heapq.heappush(waiting, (rank, left, pieces[left], pieces[right]))

        for left in range(len(pieces) - 1):
            wait(left)
        while waiting:
            _, left, first, second = heapq.heappop(waiting)
            right = after[left]
            if right >= len(pieces) or (pieces[left], pieces[right]) != (first, second):
                continue  # one of them has been merged with another
            pieces[left], pieces[right] = first + second, ""
            after[left] = after[right]
            if after[right] < len(pieces):
                before[after[right]] = left
            wait(left)
            if before[left] >= 0:
                wait(before[left])
        return " ".join(piece for piece in pieces if piece)


_SEPARATORS = "[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]"


def _text(name: str, what: str) -> str:
    try:
        return read_text(locate(name), "utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot read {what}: {error}") from error


def _lines(name: str, text: str, what: str) -> Sequence[str]:
    # str.splitlines also splits at form feeds and Unicode's separators, which other tools leave in a line.
    lines = [re.sub(_SEPARATORS, " ", line).strip() for line in re.split(r"\r\n|\r|\n", text)]
    if lines == [""]:
        raise DataError(f"{name}: expected {what}, one a line; the file is empty")
    if "" in lines:  # dropped, it would shift the labels of all names behind it
        raise DataError(f"{name}: expected {what}, one a line; line {lines.index('') + 1} is empty")
    return lines
