"""Features of many texts: distinct ones only, sorted by length, in batches of about equal numbers of tokens."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.data.prompts import text_lengths
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.model.towers import Towers, unit

TOKENS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 14}
"""Tokens, with padding, that each kind of device encodes at once: as many as fit into a CPU's cache, and enough
for all multiprocessors of a GPU, 1,638 texts of 10 tokens."""
TEXTS_TOKENIZED_AT_ONCE = 1024


class KeptTokens:
    """A tokenizer that keeps the tokens of each list of texts: evaluations of one run repeat their prompts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Has no tokens yet."""
        self.tokenizer = tokenizer
        self._tokens: dict[bytes, Tensor] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """Token rows ``(len, context)`` int64."""
        key = hashlib.sha256("".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "surrogatepass"))
        if key.digest() not in self._tokens:
            # int32: ImageNet's 80,000 prompts of 77 tokens are 25 MB.
            self._tokens[key.digest()] = self.tokenizer(texts).int()
        return self._tokens[key.digest()].long()


@torch.no_grad()
def embed_texts(towers: Towers, tokenizer: Tokenizer, texts: Sequence[str], ranks: Ranks) -> Tensor:
    """Unit rows ``(N, D)`` of texts; all ranks must call this, and all get the result.

    Texts with equal tokens are encoded once and have equal rows. Each rank tokenizes a part of the texts, and
    encodes some of the batches; these do not depend on the number of ranks. Other texts next to a text may change
    the last bits of its row.
    """
    names = list(dict.fromkeys(texts))
    row_of_name = {name: row for row, name in enumerate(names)}
    tokens, row_of_tokens = _distinct(_tokenize(tokenizer, names, ranks))
    lengths = text_lengths(tokens, towers.pooled_at)
    features = torch.zeros(len(tokens), towers.width, device=ranks.device, dtype=towers.logit_scale.dtype)
    batches = batches_by_length(lengths.tolist(), TOKENS_AT_ONCE[ranks.device.type])
    for rows in share_of_batches(batches, lengths.tolist(), ranks):
        batch = tokens[rows].to(ranks.device).long()
        features[rows] = unit(towers.encode_text(batch, int(lengths[rows].max()))).to(features.dtype)
    if ranks.group is not None:
        dist.all_reduce(features, group=ranks.group)  # each row is nonzero on one rank
    rows_of_texts = row_of_tokens[[row_of_name[text] for text in texts]]
    return features[rows_of_texts.to(ranks.device)]


def batches_by_length(lengths: Sequence[int], tokens_at_once: int) -> list[list[int]]:
    """Divides texts, the longest first, into batches of at most ``tokens_at_once`` tokens with padding.

    Args:
        lengths: tokens of each text.

    Returns:
        The indices of the texts of each batch.
    """
    batches: list[list[int]] = []
    # Stable, so that all ranks divide alike.
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_at_once:
            batches.append([])
        batches[-1].append(row)
    return batches


def share_of_batches(batches: Sequence[list[int]], lengths: Sequence[int], ranks: Ranks) -> list[list[int]]:
    """The batches that this rank encodes: each goes to the rank with the fewest tokens so far."""
    tokens, chosen = [0] * ranks.world_size, []
    for batch in batches:
        rank = tokens.index(min(tokens))
        tokens[rank] += len(batch) * lengths[batch[0]]
        if rank == ranks.rank:
            chosen.append(batch)
    return chosen


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str], ranks: Ranks) -> Tensor:
    """Token rows ``(N, context)`` int32 on the CPU; each rank tokenizes a part."""
    local = ranks.local_range(len(texts))
    parts = [
        tokenizer(list(texts[first : min(first + TEXTS_TOKENIZED_AT_ONCE, local.stop)])).int()
        for first in range(local.start, local.stop, TEXTS_TOKENIZED_AT_ONCE)
    ]
    # A rank without texts needs the context length.
    tokens = torch.cat(parts) if parts else tokenizer([""])[:0].int()
    return ranks.gather(tokens.to(ranks.device)).cpu()


def _distinct(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows ``(U, context)``, and the row of each text ``(N,)``."""
    table = np.ascontiguousarray(tokens.numpy())
    if not len(table):
        return tokens, torch.empty(0, dtype=torch.int64)
    rows = table.view(np.dtype((np.void, table.shape[1] * table.itemsize))).ravel()
    _, first, index = np.unique(rows, return_index=True, return_inverse=True)
    return tokens[torch.from_numpy(first)], torch.from_numpy(index.ravel())
