"""Learned prompts: context vectors in front of the class name, instead of the words of a hand-made prompt.

::

    [start] P_c E_c . [end]        P_c (M, d) learned, E_c (L_c, d) the token embeddings of the name of class c
    P_c = V                                                                                    shared context
    P_c = V + softmax(LN(V) W_q (LN(E_c) W_k)^T / sqrt(d / H)) LN(E_c) W_v W_o                 with attention

d is the width of the text tower, whose token embeddings are those of the present model: with attention the same
V and W give other contexts after the model was replaced. No parameter depends on the number of classes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dive_fast.errors import ConfigError

if TYPE_CHECKING:  # these import open_clip, which takes seconds
    from dive_fast.data.prompts import PooledAt
    from dive_fast.data.text_tokenizer import Tokenizer
    from dive_fast.model.towers import Towers

PLACEHOLDER = "X"
"""The word that is repeated where a random context begins with no phrase."""
DEVIATION = 0.02
"""Standard deviation of a random context, that of CLIP's token embeddings."""


class ClassTokens(NamedTuple):
    """The tokens of C class prompts ``<M context tokens> <name>.``; the ids of the context have no effect."""

    tokens: Tensor
    """``(C, N)`` int64, N the model's context length."""
    is_name: Tensor
    """``(C, N)`` bool: whether each token is one of the name."""
    lengths: tuple[int, ...]
    """Tokens of each class up to the end of the text, inclusive."""
    name_lengths: tuple[int, ...]
    """L_c of each class, tokens of the name."""
    start: int
    """Number of tokens in front of the context."""
    context_tokens: int
    """M."""
    texts: tuple[str, ...]
    """The prompts, with the phrase in place of the context."""

    def to(self, device: torch.device) -> "ClassTokens":
        """The same with its tensors on a device."""
        return self._replace(tokens=self.tokens.to(device), is_name=self.is_name.to(device))


def tokenize_classes(
    tokenizer: "Tokenizer", pooled_at: "PooledAt", class_names: Sequence[str], phrase: str
) -> ClassTokens:
    """Tokens of class prompts.

    Args:
        pooled_at: of a causal text tower.
        phrase: stands in place of the context; its tokens are M.

    Raises:
        ConfigError: the tokenizer joins tokens of the phrase and of a name, a name has no tokens, or the context
            leaves no space for names.
    """
    from dive_fast.data.prompts import text_lengths

    start = int(text_lengths(tokenizer([""]), pooled_at)[0]) - 1
    alone = tokenizer([phrase])
    count = int(text_lengths(alone, pooled_at)[0]) - 1 - start
    if count < 1:
        raise ConfigError(f"objective.context = {phrase!r}: it has no tokens; use another phrase, or a number")
    tokens = tokenizer([f"{phrase} {name}." for name in class_names])
    size = tokens.shape[1]
    if start + count + 2 > size:
        raise ConfigError(
            f"objective.context: {count} context tokens leave no space for class names in the model's context of "
            f"{size} tokens; use fewer"
        )
    plain = tokenizer([f"{phrase} {name}" for name in class_names])
    without_stop = text_lengths(plain, pooled_at)
    # A tokenizer of words makes another token of a name with a full stop; the name goes without it then.
    is_name_token = torch.arange(size) < without_stop[:, None] - 1
    is_joined = ((tokens != plain) & is_name_token).any(1)
    tokens = torch.where(is_joined[:, None], plain, tokens)
    lengths = text_lengths(tokens, pooled_at)
    # A name that fills the context has no full stop, which is truncated.
    name_lengths = torch.minimum(without_stop, lengths) - 1 - start - count
    for row, name in enumerate(class_names):
        if not torch.equal(tokens[row, : start + count], alone[0, : start + count]):
            raise ConfigError(
                f"objective.context = {phrase!r}: the tokenizer of this model joins it with the class name "
                f"{name!r}, so that its tokens cannot be replaced; use another phrase"
            )
        if name_lengths[row] < 1 or not name.strip():
            raise ConfigError(f"class {row} has the name {name!r}, which has no tokens; name it")
    position = torch.arange(size) - start - count
    is_name = (position >= 0) & (position < name_lengths[:, None])
    sizes = tuple(lengths.tolist()), tuple(name_lengths.tolist())
    ends = ("" if joined else "." for joined in is_joined.tolist())
    texts = tuple(f"{phrase} {name}{end}" for name, end in zip(class_names, ends, strict=True))
    return ClassTokens(tokens.long(), is_name, *sizes, start, count, texts)


AttendsTo = Literal["name", "context_and_name"]
"""The keys and values of the attention: the tokens of the class name, or the context vectors in front of them."""


class NameAttention(nn.Module):
    """Attention of context vectors to the token embeddings of a class name, with H heads and without biases.

    Layer norms in front of it have no gains: their inputs have other scales in every model. The output's weight is
    zero at the start, so that the context begins as V, unless the context is the attention alone.
    """

    def __init__(
        self, width: int, heads: int, residual: bool = True, seed: int = 0, attends_to: AttendsTo = "name"
    ) -> None:
        """Creates the weights, ``(d, d)`` each and equal on all ranks.

        Args:
            residual: whether V is added to the attention.
            attends_to: ``context_and_name``: LN(V) precedes the keys and values, LN(E_c).

        Raises:
            ConfigError: ``heads`` does not divide ``width``.
        """
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"objective.heads = {heads}: the text tower's width of {width} is not divisible by it; use "
                "another number"
            )
        self.heads, self.residual, self.attends_to = heads, residual, attends_to
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
            for layer in (self.query, self.key, self.value, self.output):
                nn.init.xavier_uniform_(layer.weight)
        if residual:
            nn.init.zeros_(self.output.weight)

    def forward(self, context: Tensor, names: Tensor, is_name: Tensor) -> Tensor:
        """Contexts of classes.

        Args:
            context: V, ``(M, d)``.
            names: ``(C, L, d)`` token embeddings of names, padded.
            is_name: ``(C, L)`` bool, False for padding.

        Returns:
            ``(C, M, d)``
        """
        normed, attending = (F.layer_norm(rows, rows.shape[-1:]) for rows in (names, context))
        mask = is_name
        if self.attends_to == "context_and_name":
            normed = torch.cat([attending.expand(len(names), -1, -1), normed], dim=1)
            mask = torch.cat([mask.new_ones(len(names), len(context)), mask], dim=1)
        queries = self._split(self.query(attending)[None])
        keys, values = self._split(self.key(normed)), self._split(self.value(normed))
        attended = attend(queries, keys, values, mask[:, None, None])
        change: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return context + change if self.residual else change

    def _split(self, rows: Tensor) -> Tensor:
        """``(C, L, d) -> (C, H, L, d / H)``"""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over the keys where ``mask`` is True, ``(..., M, d)``."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values


class LearnedPrompts(nn.Module):
    """The learned context of class prompts: M vectors that all classes share, with or without attention."""

    def __init__(self, context: Tensor, phrase: str, attention: NameAttention | None = None) -> None:
        """Takes the start of the context.

        Args:
            context: ``(M, d)``, copied.
            phrase: M tokens that stand in place of the context where names are tokenised.
        """
        super().__init__()
        self.context = nn.Parameter(context.detach().float().clone())
        self.phrase, self.attention = phrase, attention
        self.origin: Any = None
        """The :class:`~dive_fast.model.prompt_file.Origin` for their file; None before it is set."""

    def forward(self, names: Tensor | None, is_name: Tensor | None) -> Tensor:
        """Contexts, ``(C, M, d)`` or, where all classes have the same one, ``(1, M, d)``.

        Args:
            names, is_name: as in :class:`NameAttention`; not used without attention.
        """
        if self.attention is None:
            return self.context[None]
        assert names is not None
        assert is_name is not None
        contexts: Tensor = self.attention(self.context, names, is_name)
        return contexts


def check_text_tower(towers: "Towers") -> None:
    """Validates that prompts can be learned for a text tower.

    Raises:
        ConfigError: it is not causal, or has no table of token embeddings.
    """
    if towers.pooled_at is None or not isinstance(token_table(towers), nn.Module):
        name = "this model" if towers.config is None else towers.config.name
        raise ConfigError(
            f"model.name: the text tower of {name} is not a causal one of open_clip that reads its feature at the "
            "end of the text; prompts cannot be learned for it, so use another model or method"
        )


def token_table(towers: "Towers") -> Any:
    """The module that maps tokens to embeddings, of width d; None where there is none."""
    return getattr(towers.text, "token_embedding", None)


def initial_context(towers: "Towers", classes: ClassTokens, is_random: bool, seed: int) -> Tensor:
    """The start of a context, ``(M, d)``: the embeddings of its phrase, or random and equal on all ranks."""
    table = token_table(towers).weight
    if not is_random:
        rows = classes.tokens[0, classes.start : classes.start + classes.context_tokens]
        start: Tensor = table[rows.to(table.device)]
        return start.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    random = DEVIATION * torch.randn(classes.context_tokens, table.shape[1], generator=generator)
    return random.to(table.device)


def encode_classes(towers: "Towers", prompts: LearnedPrompts, classes: ClassTokens, rows: Sequence[int]) -> Tensor:
    """Unnormalised features of some classes, ``(len(rows), D)``, with gradient by the prompts.

    Args:
        classes: with its tokens on the towers' device.
        rows: classes to encode; the text tower gets as many tokens as the longest of them.
    """
    first, last = rows[0], rows[-1] + 1
    assert len(rows) == last - first, "classes are encoded in order"
    tokens, table = classes.tokens[first:last], token_table(towers)
    names = is_name = None
    if prompts.attention is not None:
        begin = classes.start + classes.context_tokens
        end = begin + max(classes.name_lengths[first:last])
        names = F.embedding(tokens[:, begin:end], table.weight).float()
        is_name = classes.is_name[first:last, begin:end]
    contexts = prompts(names, is_name).expand(len(tokens), -1, -1)
    with _replaced(table, contexts, classes.start):
        return towers.encode_text(tokens, max(classes.lengths[first:last]))


@contextmanager
def _replaced(table: nn.Module, contexts: Tensor, start: int) -> Iterator[None]:
    """Replaces the embeddings of context tokens by learned vectors, ``(C, M, d)``, within the context."""

    def replace(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        end = start + contexts.shape[1]
        return torch.cat([embedded[:, :start], contexts.to(embedded.dtype), embedded[:, end:]], dim=1)

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
