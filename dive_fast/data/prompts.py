"""Tokens of prompts from class names and templates, and the distinct token rows of a batch of texts."""

import logging
import os
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dive_fast.data.batch import Text
from dive_fast.data.classes import check_labels
from dive_fast.data.prompt_files import Template
from dive_fast.data.random_streams import Draw, stream, uniforms
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.data.token_cache import ListedTexts, kept_tokens, tokens_of
from dive_fast.distributed import Ranks

logger = logging.getLogger(__name__)

PooledAt = Literal["argmax"] | int | None
"""The token at which a causal text tower reads its feature: the largest token id, or a given id. Later tokens do
not change the feature. None: the tower needs the complete context."""


class PromptTable:
    """The tokenised prompts of a target set."""

    def __init__(
        self,
        source: Source,
        class_names: Sequence[str],
        templates: Sequence[Template],
        tokenizer: Tokenizer,
        ranks: Ranks | None = None,
    ):
        """Tokenises the texts of the samples if they have any (CSV), otherwise class names x templates.

        Args:
            ranks: all ranks call this, and one process of each node tokenises; None: this process does.

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
        kept = kept_tokens(ListedTexts(prompts), tokenizer, "prompts", ranks)
        self._tokens = tokens_of(prompts, tokenizer) if kept is None else kept

    @property
    def are_texts(self) -> bool:
        """Whether prompts are texts of the samples, which have no classes."""
        return self._titles is not None

    def draw(self, samples: Sequence[Sample], indices: Sequence[int], seed: int, epochs: Sequence[int]) -> Tensor:
        """The tokens, ``(B, context)``, of random prompts of samples: pure functions of (seed, index, epoch)."""
        draws = uniforms(seed, Draw.PROMPT, indices, epochs, 1)[:, 0].tolist()
        rows = [
            self._row(sample, int(draw * self._count(sample))) for sample, draw in zip(samples, draws, strict=True)
        ]
        return self._tokens.rows(np.array(rows, np.int64))

    def _row(self, sample: Sample, number: int) -> int:
        if self._titles is not None:
            return self._titles[sample.texts[number]]
        return sample.label * len(self._templates) + number

    def text(self, sample: Sample, index: int, seed: int, epoch: int) -> str:
        """The prompt whose tokens :meth:`draw` returns."""
        number = int(float(stream(seed, Draw.PROMPT, index, epoch).random()) * self._count(sample))
        if self._titles is not None:
            return sample.texts[number]
        return self._templates[number](self._class_names[sample.label])

    def _count(self, sample: Sample) -> int:
        """Number of prompts of a sample: its texts, or the templates."""
        return len(self._templates) if self._titles is None else len(sample.texts)


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
    """Warns as :func:`warn_about_class_texts`, for the longest template."""
    if class_names and templates:
        template = max(templates, key=lambda template: len(template("")))
        warn_about_class_texts(class_names, [template(name) for name in class_names], tokenizer)


def warn_about_class_texts(class_names: Sequence[str], prompts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Warns about truncated prompts and about classes with equal prompt tokens.

    Tokenizers truncate a prompt to the model's context without a warning, and with it the class name.

    Args:
        prompts: one of each class.
    """
    parts = [list(prompts[first : first + 1024]) for first in range(0, len(prompts), 1024)]
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
