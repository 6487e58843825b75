"""Tokens of many texts: made once per node in processes, kept between runs, memory-mapped by ranks and workers.

A tokenizer written in Python needs a tenth of a millisecond for a caption: minutes an epoch for millions of them.
The tokens are kept in the cache folder under everything that decides them: the tokenizer and the texts.
"""

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dive_fast.data.sources.sample_table import SampleTable
from dive_fast.data.text_tokenizer import TOKENIZER_PROBES, Tokenizer
from dive_fast.data.workers import in_workers
from dive_fast.distributed import Ranks
from dive_fast.errors import MachineError, UserError
from dive_fast.identity import Identity, digest, versions
from dive_fast.io.cache_folder import cache_folder, remove_unused
from dive_fast.io.column_folder import load_columns, save_columns
from dive_fast.locks import file_lock

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the stored columns; change it with them."""
FOLDER = "tokens"
"""Folder of the tokens in the cache."""
PACKAGES = ("open_clip_torch", "transformers", "tokenizers", "ftfy", "regex")
"""Packages whose version may change the tokens of a text."""
MIN_TEXTS = 20_000
"""Fewer texts are tokenised at each start or when they are drawn, which takes seconds."""
CHUNK = 1024
"""Texts that a process tokenises at once."""
MAX_PROCESSES = 32


class TokenRows:
    """Token rows of many texts without their padding: some 13 tokens of a caption instead of 77."""

    def __init__(self, values: NDArray[Any], ends: NDArray[np.int64], context: int, padding: int) -> None:
        """Takes the rows as columns.

        Args:
            values: ``(tokens,)`` uint16 or int32: all rows, one after the other, each without trailing padding.
            ends: ``(N,)``: the end of each row in ``values``.
            context: tokens of a row with its padding.
            padding: token that fills a row.
        """
        self._values, self._ends = values, ends
        self.context, self.padding = context, padding

    @classmethod
    def of(cls, rows: Tensor, padding: int) -> "TokenRows":
        """The rows of ``(N, context)`` tokens."""
        tokens = rows.numpy()
        is_token = tokens != padding
        lengths = np.where(is_token.any(1), tokens.shape[1] - is_token[:, ::-1].argmax(1), 0)
        is_kept = np.arange(tokens.shape[1]) < lengths[:, None]
        return cls(_smallest(tokens[is_kept]), np.cumsum(lengths, dtype=np.int64), tokens.shape[1], padding)

    @classmethod
    def joined(cls, parts: "Sequence[TokenRows]") -> "TokenRows":
        """The rows of all parts in order."""
        ends, offset = [], 0
        for part in parts:
            ends.append(part._ends + offset)
            offset += len(part._values)
        values = np.concatenate([part._values for part in parts])  # int32 if any part needs it
        return cls(values, np.concatenate(ends), parts[0].context, parts[0].padding)

    def __len__(self) -> int:
        return len(self._ends)

    def rows(self, indices: NDArray[np.int64]) -> Tensor:
        """The rows of some indices, ``(len, context)`` int64."""
        starts = np.where(indices > 0, self._ends[indices - 1], 0)
        lengths = self._ends[indices] - starts
        row = np.repeat(np.arange(len(indices)), lengths)
        column = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
        rows = np.full((len(indices), self.context), self.padding, np.int64)
        rows[row, column] = self._values[starts[row] + column]
        return torch.from_numpy(rows)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays, to be stored."""
        return {"values": self._values, "ends": self._ends}


def _smallest(tokens: NDArray[np.int64]) -> NDArray[Any]:
    """Tokens as uint16 if they fit, otherwise as int32."""
    fits = not tokens.size or (int(tokens.min()) >= 0 and int(tokens.max()) < 2**16)
    return tokens.astype(np.uint16 if fits else np.int32)


# Texts


class Texts(ABC):
    """Texts to tokenise, read in ranges."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def part(self, rows: range) -> list[str]:
        """The texts of some rows."""

    @abstractmethod
    def digest(self) -> str:
        """A hash of all texts."""


class ListedTexts(Texts):
    """Texts in a list."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def part(self, rows: range) -> list[str]:
        """The texts of some rows."""
        return list(self._texts[rows.start : rows.stop])

    def digest(self) -> str:
        """A hash of all texts."""
        return digest(list(self._texts))


class Captions(Texts):
    """The texts of the distinct lists of texts of a data set, one list after the other, or the first of each."""

    def __init__(self, samples: SampleTable, first_only: bool) -> None:
        self._samples = samples
        self.first_row: NDArray[np.int64] | None = None
        """``(lists + 1,)``: the row of each list's first text, and the number of all texts; None: one per list."""
        if not first_only:
            self.first_row = np.concatenate([[0], np.cumsum(samples.list_counts)])

    def __len__(self) -> int:
        return len(self._samples.lists) if self.first_row is None else int(self.first_row[-1])

    def part(self, rows: range) -> list[str]:
        """The texts of some rows."""
        if self.first_row is None:
            return [next(iter(self._samples.texts_of_list(row)), "") for row in rows]
        first, last = np.searchsorted(self.first_row, [rows.start, rows.stop - 1], "right") - 1
        lists = [self._samples.texts_of_list(row) for row in range(int(first), int(last) + 1)]
        # Otherwise all later captions would get the tokens of others.
        assert list(map(len, lists)) == np.diff(self.first_row[first : last + 2]).tolist()
        skipped = rows.start - int(self.first_row[first])
        return [text for texts in lists for text in texts][skipped : skipped + len(rows)]

    def digest(self) -> str:
        """A hash of all texts."""
        lists, is_first = self._samples.lists, self.first_row is None
        result = hashlib.sha256(f"{is_first} {self._samples.captions_are_lines}".encode())
        if self._samples.stored_digest:  # it has the texts, among other columns
            result.update(self._samples.stored_digest.encode())
            return result.hexdigest()
        result.update(lists.lengths.astype("<i8").tobytes())
        result.update(np.ascontiguousarray(lists.values).data)
        return result.hexdigest()


class CaptionTokens:
    """The tokens of the captions of a data set's samples."""

    def __init__(self, samples: SampleTable, tokens: TokenRows, first_row: NDArray[np.int64] | None) -> None:
        """Takes the tokens of :class:`Captions` of the same samples, and its ``first_row``."""
        self._samples, self._tokens, self._first_row = samples, tokens, first_row

    def rows(self, sample: NDArray[np.int64], captions: NDArray[np.int64]) -> Tensor:
        """The tokens, ``(B, context)`` int64, of one caption of each sample."""
        lists = self._lists(sample)
        return self._tokens.rows(lists if self._first_row is None else self._first_row[lists] + captions)

    def all_rows(self, sample: NDArray[np.int64]) -> Tensor:
        """The tokens of all captions of some samples, sample by sample."""
        lists = self._lists(sample)
        if self._first_row is None:
            return self._tokens.rows(lists)
        bounds = zip(self._first_row[lists], self._first_row[lists + 1], strict=True)
        return self._tokens.rows(np.concatenate([np.arange(first, last) for first, last in bounds]))

    def _lists(self, sample: NDArray[np.int64]) -> NDArray[np.int64]:
        list_of = self._samples.list_of
        return sample if list_of is None else list_of[sample].astype(np.int64)


# The cache


def kept_tokens(
    texts: Texts | None, tokenizer: Tokenizer, name: str, ranks: Ranks | None = None
) -> TokenRows | None:
    """The tokens of many texts from the cache; they are made and kept if they are missing.

    Args:
        texts: None: none are wanted on this rank.
        name: name of the texts for messages: ``captions``.
        ranks: all ranks call this; the first rank of each node makes the tokens, and the others map them. None:
            this process makes them.

    Returns:
        None for fewer than :data:`MIN_TEXTS`, for a tokenizer of unknown state, and if nothing can be kept.
    """
    stamp = None
    if texts is not None and len(texts) >= MIN_TEXTS and (identity := tokenizer_identity(tokenizer)) is not None:
        stamp = digest([FORMAT, identity, texts.digest()])

    def keep() -> Path | None:
        return None if texts is None or stamp is None else _keep(texts, tokenizer, stamp, name)

    # Ranks may have other texts, which is reported later; each rank has the tokens of its own.
    folder = keep() if ranks is None else ranks.once_per_node(stamp, keep, UserError, MachineError)
    return None if folder is None else _load(folder, None)


def kept_captions(
    samples: SampleTable | None, tokenizer: Tokenizer, first_only: bool, ranks: Ranks | None = None
) -> CaptionTokens | None:
    """The tokens of a data set's captions; arguments and None as in :func:`kept_tokens`.

    Args:
        first_only: whether only the first caption of each sample is used.
    """
    captions = None
    if samples is not None and samples.rows is None and samples.has_texts:  # not a part, which may be small
        captions = Captions(samples, first_only)
    tokens = kept_tokens(captions, tokenizer, "captions", ranks)
    if samples is None or captions is None or tokens is None:
        return None
    return CaptionTokens(samples, tokens, captions.first_row)


def tokens_of(texts: Sequence[str], tokenizer: Tokenizer) -> TokenRows:
    """The tokens of some texts, made in this process and not kept."""
    padding = _padding(tokenizer)
    chunks = [list(texts[first : first + CHUNK]) for first in range(0, len(texts), CHUNK)]
    return TokenRows.joined([TokenRows.of(tokenizer(chunk), padding) for chunk in chunks])


def tokenizer_identity(tokenizer: Tokenizer) -> Identity | None:
    """Everything that decides the tokens of a text; None for a tokenizer whose state is not known completely."""
    state = dict(vars(tokenizer)) if hasattr(tokenizer, "__dict__") else {}
    if state.get("reduction_fn") is not None:  # may draw random numbers
        return None
    if {"encoder", "bpe_ranks"} <= state.keys():
        vocabulary = repr((list(state["encoder"].items()), list(state["bpe_ranks"].items()), state.get("pat")))
    elif (backend := getattr(state.get("tokenizer"), "backend_tokenizer", None)) is not None:
        vocabulary = backend.to_str() + repr(state["tokenizer"].init_kwargs)
    else:
        return None
    plain = str | int | float | None
    options = {key: getattr(value, "__qualname__", value) for key, value in state.items()}
    return {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "vocabulary": hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest(),
        "options": {key: value for key, value in options.items() if isinstance(value, plain)},
        "probes": hashlib.sha256(tokenizer(list(TOKENIZER_PROBES)).numpy().tobytes()).hexdigest(),
        "versions": versions(PACKAGES),
    }


def _keep(texts: Texts, tokenizer: Tokenizer, stamp: str, name: str) -> Path | None:
    """The folder of the tokens, which are made if they are missing; None if they cannot be kept.

    Args:
        stamp: digest of the tokenizer and the texts.
    """
    with ExitStack() as lock:
        try:
            parent = cache_folder(FOLDER)
            folder = parent / stamp[:32]
            if _load(folder, stamp) is not None:
                return folder
            lock.enter_context(file_lock(parent / f"{folder.name}.lock", f"the tokens of {name}", wait=True))
        except (OSError, UserError) as error:
            logger.warning("tokens of %s are not kept: %s", name, error)
            return None
        if _load(folder, stamp) is not None:
            return folder
        tokens = _tokenise(texts, tokenizer, name)
        try:
            about = {"context": tokens.context, "padding": tokens.padding}
            save_columns(folder, tokens.columns(), about, stamp)
        except OSError as error:
            logger.warning("%s: the tokens of %s are not kept: %s", folder, name, error)
            return None
        remove_unused(parent)
    return folder


def _load(folder: Path, stamp: str | None) -> TokenRows | None:
    """The tokens of a folder, memory-mapped; None if there are none, or they are damaged.

    Args:
        stamp: as for :func:`dive_fast.io.column_folder.load_columns`.
    """
    try:
        if (loaded := load_columns(folder, stamp)) is None:
            return None
        columns, about = loaded
        return TokenRows(columns["values"], columns["ends"], int(about["context"]), int(about["padding"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: the tokens are damaged (%s); they are made again", folder, error)
        return None


def _tokenise(texts: Texts, tokenizer: Tokenizer, name: str) -> TokenRows:
    """The tokens of all texts, made in processes; a progress bar shows the time that is left."""
    chunks = [range(first, min(first + CHUNK, len(texts))) for first in range(0, len(texts), CHUNK)]
    processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)), len(chunks))
    # On each node by the process that works there.
    alone, parts = Ranks(0, 1, torch.device("cpu")), []
    with alone.progress(len(texts), f"tokens of {name}", "text") as bar:
        for part in in_workers(_Tokenise(texts, tokenizer, _padding(tokenizer)), chunks, processes):
            parts.append(part)
            bar.update(len(part))
    return TokenRows.joined(parts)


def _padding(tokenizer: Tokenizer) -> int:
    """The token that ends a short row. Any token would do: it only decides which part of a row is stored."""
    return int(tokenizer([""])[0, -1])


class _Tokenise:
    """Tokenises a range of texts, in a worker process."""

    def __init__(self, texts: Texts, tokenizer: Tokenizer, padding: int) -> None:
        self._texts, self._tokenizer, self._padding = texts, tokenizer, padding

    def __call__(self, rows: range) -> TokenRows:
        return TokenRows.of(self._tokenizer(self._texts.part(rows)), self._padding)
