"""Prompts from class names and templates, and the distinct token rows of a batch of texts."""

import heapq
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from torch import Tensor

from dive_fast.data.batch import Text
from dive_fast.data.random_streams import Draw, stream
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source, locate
from dive_fast.errors import DataError, naming
from dive_fast.io.safe_read import parse_json, read_text

logger = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]
"""A function from texts to token rows, ``(len, context)`` int64."""
PooledAt = Literal["argmax"] | int | None
"""The token at which a causal text tower reads its feature: the largest token id, or a given id. Later tokens do
not change the feature. None: the tower needs the complete context."""
TOKENIZER_PROBES = ("a photo of a cat.", "Größe: 10 µm, naïve café 東京", "", "word " * 100)
"""Texts whose tokens distinguish tokenizers."""


class Template:
    """A prompt template: its text has ``{}`` in place of the class name."""

    def __init__(self, template: str) -> None:
        self.template = template

    def __call__(self, class_name: str) -> str:
        """The prompt of a class."""
        return self.template.replace("{}", class_name)


def read_class_names(name: str) -> tuple[str, ...]:
    """Class names from open_clip (``imagenet``), a text file with one name per line, or a JSON list.

    Raises:
        DataError: the file does not exist, is empty, or has an empty line or lines that are not plain names.
    """
    if name == "imagenet":
        return tuple(open_clip.IMAGENET_CLASSNAMES)
    text = _text(name, "class names")
    if text.lstrip()[:1] in ("[", "{"):
        return _json_list(name, text, "class name", "class names, in label order, or one name per line")
    lines = _lines(name, text, "class names")
    table = _numbered(lines)
    if table is not None:
        prefix, example = table
        raise DataError(
            f"{name}: each line begins with {prefix}, which would be part of the class name "
            f"({example[:40]!r}); keep only the names"
        )
    _refuse_code(name, lines, "class name")
    return tuple(lines)


_NUMBERED = re.compile(r"(n[0-9]{8}|[0-9]+)\.?[\s:,;]")


def _numbered(lines: Sequence[str]) -> tuple[str, str] | None:
    """The kind of prefix that all lines of a table have, and the first such line; None: the lines are names."""
    for rows in (lines, lines[1:] if len(lines) > 2 else []):  # the first line may be a header
        starts = [match[1] for match in map(_NUMBERED.match, rows) if match]
        if not rows or len(starts) < len(rows):
            continue
        if all(start.startswith("n") for start in starts):
            return "a WordNet id", rows[0]
        numbers = [int(start) for start in starts if start.isdecimal()]
        if numbers in (list(range(len(rows))), list(range(1, len(rows) + 1))):
            return "its number", rows[0]
    return None


def _refuse_code(name: str, lines: Sequence[str], entry: str) -> None:
    """Refuses the syntax of a programming language or of YAML, which would become part of every prompt.

    Args:
        entry: the noun for a line, for messages.

    Raises:
        DataError: all lines are quoted or list items, or the first one is a comment.
    """
    if all(re.fullmatch(r"""(["']).*\1,?""", line) for line in lines):
        raise DataError(
            f"{name}: all lines are quoted, and the quotes would be part of each {entry} ({lines[0][:40]!r}); "
            "remove them, or write a JSON list"
        )
    if all(line.startswith("- ") for line in lines):
        raise DataError(f"{name}: each line begins with '- ', which would be part of the {entry}; remove it")
    if lines[0].startswith("#"):
        raise DataError(
            f"{name}: its first line is a comment, {lines[0][:40]!r}, which would be a {entry}; remove it"
        )


def _json_list(name: str, text: str, entry: str, entries: str) -> tuple[str, ...]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{name}: begins like JSON but is not valid: {error}; expected one {entry} per line"
        ) from error
    is_list = isinstance(values, list) and len(values) > 0
    if not is_list or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{name}: expected a JSON list of {entries}")
    return tuple(value.strip() for value in values)


def read_templates(name: str, key: str = "", content: str = "the class name") -> tuple[Template, ...]:
    """Templates from open_clip (``imagenet``, ``simple``), a file with one per line, or ``name`` as the only one.

    Args:
        name: ``imagenet``, ``simple``, a file, or a template itself.
        key: config key for messages.
        content: the noun for what ``{}`` stands for, for messages.

    Raises:
        DataError: the file does not exist, or a template has no ``{}``.
    """
    if name in ("imagenet", "simple"):
        shipped = {"imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        return tuple(Template(template("{}")) for template in shipped[name])
    with naming(key):
        lines = [name] if "{}" in name else _templates_in(name, content)
        for line in lines:
            if "{}" not in line:
                raise DataError(f"{name}: template {line!r} has no {{}} for {content}")
            if (field := re.search(r"\{\w+\}", line)) is not None:
                raise DataError(
                    f"{name}: template {line!r} has an unknown placeholder {field[0]}; use {{}} for {content}"
                )
    return tuple(Template(line) for line in lines)


def _templates_in(name: str, content: str) -> Sequence[str]:
    if not name.startswith("demo:") and not locate(name).exists():
        raise DataError(f"{name}: no such file of templates; a template itself must have {{}} for {content}")
    text = _text(name, "templates")
    if text.lstrip().startswith("["):
        return _json_list(name, text, "template", "templates, or one template per line")
    lines = _lines(name, text, "templates")
    _refuse_code(name, lines, "prompt")
    return lines


def check_labels(source: Source, class_names: Sequence[str]) -> None:
    """Checks that every label has a class name.

    Raises:
        DataError: a label has no class name.
    """
    labels = source.samples.labels
    invalid = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if invalid.size:
        sample = source.samples[int(invalid[0])]
        raise DataError(
            f"{sample.path}: sample {sample.key} has label {sample.label}, "
            f"but there are {len(class_names)} class names"
        )


class PromptTable:
    """The tokenised prompts of a target set."""

    def __init__(
        self, source: Source, class_names: Sequence[str], templates: Sequence[Template], tokenizer: Tokenizer
    ):
        """Tokenises the texts of the samples if they have any (CSV), otherwise class names x templates.

        Raises:
            DataError: a label has no class name.
        """
        self._titles: dict[str, int] | None = None
        self._class_names, self._templates = class_names, templates
        if source.samples.has_texts:
            prompts = list(dict.fromkeys(text for texts in source.samples.text_lists() for text in texts))
            self._titles = {title: row for row, title in enumerate(prompts)}
        else:
            check_labels(source, class_names)
            prompts = [template(name) for name in class_names for template in templates]
            warn_about_prompts(class_names, templates, tokenizer)
        # int32: ImageNet's 80,000 prompts of 77 tokens are 25 MB, in every worker.
        self._tokens = torch.cat([tokenizer(prompts[i : i + 1024]).int() for i in range(0, len(prompts), 1024)])

    @property
    def are_texts(self) -> bool:
        """Whether prompts are texts of the samples, which have no classes."""
        return self._titles is not None

    def draw(self, sample: Sample, index: int, seed: int, epoch: int) -> Tensor:
        """The tokens, ``(context,)``, of a random prompt of a sample: a pure function of (seed, sample, epoch)."""
        number = self._number(sample, index, seed, epoch)
        if self._titles is not None:
            return self._tokens[self._titles[sample.texts[number]]]
        return self._tokens[sample.label * len(self._templates) + number]

    def text(self, sample: Sample, index: int, seed: int, epoch: int) -> str:
        """The prompt whose tokens :meth:`draw` returns."""
        number = self._number(sample, index, seed, epoch)
        if self._titles is not None:
            return sample.texts[number]
        return self._templates[number](self._class_names[sample.label])

    def _number(self, sample: Sample, index: int, seed: int, epoch: int) -> int:
        """The number of the drawn text or template."""
        count = len(self._templates) if self._titles is None else len(sample.texts)
        return int(float(stream(seed, Draw.PROMPT, index, epoch).random()) * count)


CACHED_PROMPTS = 1 << 15
"""Second prompts whose tokens a loader process keeps: 10 MB at 77 tokens."""


class SecondPrompts:
    """Second prompts: each image's prompt, without its final full stop, in one of the templates."""

    def __init__(self, prompts: PromptTable, templates: Sequence[Template], tokenizer: Tokenizer) -> None:
        """Takes the prompts that are put into the templates; they are tokenised when they are drawn."""
        self._prompts, self._templates, self._tokenizer = prompts, templates, tokenizer
        self._tokens: dict[str, Tensor] = {}

    def text(self, sample: Sample, index: int, seed: int, epoch: int) -> str:
        """The second prompt of a sample: a pure function of (seed, sample, epoch)."""
        number = int(float(stream(seed, Draw.SECOND_PROMPT, index, epoch).random()) * len(self._templates))
        return self._templates[number](self._prompts.text(sample, index, seed, epoch).removesuffix("."))

    def draw(self, samples: Sequence[tuple[Sample, int, int]], seed: int) -> Tensor:
        """The tokens, ``(B, context)``, of the second prompts of samples.

        Args:
            samples: each with its index and the epoch.
        """
        texts = [self.text(sample, index, seed, epoch) for sample, index, epoch in samples]
        missing = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if missing:
            # int32 rows of their own, so that one that is kept does not keep all.
            rows = self._tokenizer(missing).int()
            self._tokens.update((text, row.clone()) for text, row in zip(missing, rows, strict=True))
        drawn = torch.stack([self._tokens[text] for text in texts])
        for text in list(islice(self._tokens, max(0, len(self._tokens) - CACHED_PROMPTS))):
            del self._tokens[text]  # the oldest
        return drawn

    def warn_about_truncated(self, source: Source, seed: int) -> None:
        """Warns about second prompts of the first epoch that are truncated to the model's context."""
        every = max(1, -(-len(source) // 1024))
        texts = [self.text(source.samples[row], row, seed, 0) for row in range(0, len(source), every)]
        warn_about_truncated_captions(texts, self._tokenizer, "second prompts")


def warn_about_prompts(class_names: Sequence[str], templates: Sequence[Template], tokenizer: Tokenizer) -> None:
    """Warns about truncated prompts and about classes with equal prompt tokens, for the longest template.

    Tokenizers truncate a prompt to the model's context without a warning, and with it the class name.
    """
    if not class_names or not templates:
        return
    template = max(templates, key=lambda template: len(template("")))
    prompts = [template(name) for name in class_names]
    parts = [prompts[first : first + 1024] for first in range(0, len(prompts), 1024)]
    tokens = torch.cat([tokenizer(part) for part in parts])
    longer = torch.cat([tokenizer([f"{prompt} and more" for prompt in part]) for part in parts])
    is_truncated = (tokens == longer).all(1)
    if bool(is_truncated.any()):
        first = prompts[int(is_truncated.int().argmax())]
        warn_once(
            f"{int(is_truncated.sum())} of {len(prompts)} classes have a prompt that fills the model's context of "
            f"{tokens.shape[1]} tokens and is truncated: {first[:30]!r} ... {first[-30:]!r}; shorten the "
            "template or the name"
        )
    name_of_tokens: dict[bytes, str] = {}
    for name, row in zip(class_names, tokens.numpy(), strict=True):
        other = name_of_tokens.setdefault(row.tobytes(), name)
        if other != name:  # dive_fast.data.classes warns about equal names
            warn_once(
                f"classes {other[:40]!r} and {name[:40]!r} have prompts with the same tokens: prompts cannot "
                "distinguish them, nor possibly others"
            )
            return


def warn_about_truncated_captions(texts: Sequence[str], tokenizer: Tokenizer, name: str) -> None:
    """Warns about captions truncated to the model's context, by a sample of up to 1024 evenly spaced ones.

    Args:
        name: name of the set, for the message.
    """
    sampled = [texts[row] for row in range(0, len(texts), max(1, -(-len(texts) // 1024)))]
    if not sampled:
        return
    tokens, longer = tokenizer(sampled), tokenizer([f"{text} and more" for text in sampled])
    count = int((tokens == longer).all(1).sum())
    if count:
        warn_once(
            f"{name}: {count} of {len(sampled)} sampled captions fill the model's context of {tokens.shape[1]} "
            "tokens and are truncated"
        )


@cache
def warn_once(message: str) -> None:
    """Logs a warning on rank 0, only the first time it is called with this message."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def pack(tokens: Tensor, pooled_at: PooledAt) -> Text:
    """Packs token rows, ``(B, context)``, into the distinct texts of a batch."""
    distinct, index = torch.unique(tokens.long(), dim=0, return_inverse=True)
    return Text(distinct, index, text_length(distinct, pooled_at))


def text_length(tokens: Tensor, pooled_at: PooledAt) -> int:
    """Tokens up to the end-of-text token of the longest row of ``(N, context)``, inclusive."""
    return int(text_lengths(tokens, pooled_at).max())


def text_lengths(tokens: Tensor, pooled_at: PooledAt) -> Tensor:
    """Tokens of each row of ``(N, context)`` up to its end-of-text token, inclusive: ``(N,)`` int64."""
    if pooled_at is None:
        return torch.full((len(tokens),), tokens.shape[1])
    ends = tokens if pooled_at == "argmax" else (tokens == pooled_at).int()
    return ends.argmax(1) + 1


LONG_WORD = 64
"""Minimum characters of the words that :func:`quick_bpe` merges itself."""


def quick_bpe(tokenizer: Any) -> Any:
    """open_clip's BPE tokenizer with equal tokens, but n log n instead of quadratic time for long words.

    open_clip needs half a minute for a word of 16,000 letters. Other tokenizers are returned unchanged.
    """
    if isinstance(tokenizer, open_clip.SimpleTokenizer) and not isinstance(
        getattr(tokenizer, "bpe", None), _QuickBpe
    ):
        tokenizer.bpe = _QuickBpe(tokenizer)
    return tokenizer


class _QuickBpe:
    """Merges pairs by rank, equal pairs from left to right.

    A pair that results from a merge was learned after that merge, so its rank is higher. The result therefore
    equals open_clip's, which merges all equal pairs before it looks for the next one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._ranks: dict[tuple[str, str], int] = tokenizer.bpe_ranks
        self._original: Callable[[str], str] = tokenizer.bpe

    def __call__(self, token: str) -> str:
        """The pieces of a word, separated by spaces."""
        if len(token) < LONG_WORD:
            return self._original(token)
        pieces = [*token[:-1], f"{token[-1]}</w>"]
        # A piece that was merged into its predecessor is empty.
        after = list(range(1, len(pieces) + 1))
        before = list(range(-1, len(pieces) - 1))
        candidates: list[tuple[int, int, str, str]] = []

        def push(left: int) -> None:
            right = after[left]
            if right < len(pieces):
                rank = self._ranks.get((pieces[left], pieces[right]))
                if rank is not None:
                    heapq.heappush(candidates, (rank, left, pieces[left], pieces[right]))

        for left in range(len(pieces) - 1):
            push(left)
        while candidates:
            _, left, first, second = heapq.heappop(candidates)
            right = after[left]
            if right >= len(pieces) or (pieces[left], pieces[right]) != (first, second):
                continue  # one of the pieces was merged with another one
            pieces[left], pieces[right] = first + second, ""
            after[left] = after[right]
            if after[right] < len(pieces):
                before[after[right]] = left
            push(left)
            if before[left] >= 0:
                push(before[left])
        return " ".join(piece for piece in pieces if piece)


_SEPARATORS = "[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]"


def _text(name: str, contents: str) -> str:
    try:
        return read_text(locate(name), "utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: cannot read {contents}: {reason}") from error


def _lines(name: str, text: str, contents: str) -> Sequence[str]:
    # str.splitlines also splits at form feeds and Unicode separators, which other tools keep inside a line.
    lines = [re.sub(_SEPARATORS, " ", line).strip() for line in re.split(r"\r\n|\r|\n", text)]
    if lines == [""]:
        raise DataError(f"{name}: expected {contents}, one per line; the file is empty")
    if "" in lines:  # skipping it would shift the labels of all later names
        raise DataError(f"{name}: expected {contents}, one per line; line {lines.index('') + 1} is empty")
    return lines
