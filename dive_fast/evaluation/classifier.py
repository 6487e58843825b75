"""Classifiers of image features: cached embeddings of class prompts (Eq. 2-3), or rows of a trained head."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from open_clip import IMAGENET_CLASSNAMES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dive_fast.data.classes import composed, repeated, synsets
from dive_fast.data.prompt_files import Template
from dive_fast.data.prompts import warn_about_class_texts
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, UserError
from dive_fast.evaluation.feature_identity import classifier_identity
from dive_fast.evaluation.text_features import embed_texts
from dive_fast.identity import digest
from dive_fast.io.atomic_files import atomic_path
from dive_fast.locks import folder_lock
from dive_fast.model.head import Head
from dive_fast.model.learned_prompts import encode_classes, tokenize_classes
from dive_fast.model.towers import Towers, unit

Members = tuple[tuple[int, ...], ...]
"""For each label, the classes that count as it."""

PROMPTS_AT_ONCE = 1 << 16
"""Prompts whose embeddings are in memory at once: 134 MB in fp32 at width 512."""


CLASSES_AT_ONCE = 256
"""Classes that a rank encodes at once by learned prompts."""


class Classifier(NamedTuple):
    """Weights of classes; the logit of a label is the largest over its classes."""

    kind: Literal["prompts", "learned prompts", "head"]
    weight: Tensor
    """``(C, D)``; unit rows unless the kind is ``head``."""
    bias: Tensor | None = None
    """``(C,)``"""
    members: Members | None = None
    """None: class i is label i."""
    scale: float = 1.0
    """Factor of the logits in the softmax: the model's logit scale for prompts, whose logits are cosines; 1 for a
    head, whose rows contain its scale."""

    @property
    def num_labels(self) -> int:
        """Number of columns of :meth:`logits`."""
        return len(self.weight) if self.members is None else len(self.members)

    def logits(self, features: Tensor) -> Tensor:
        """Logits ``(B, num_labels)`` of unit feature rows ``(B, D)``."""
        logits = features @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        if self.members is None:
            return logits
        device = logits.device
        classes = torch.tensor([row for rows in self.members for row in rows], device=device)
        label = torch.tensor([i for i, rows in enumerate(self.members) for _ in rows], device=device)
        largest = logits.new_full((len(logits), len(self.members)), -torch.inf)
        return largest.scatter_reduce_(1, label.expand(len(logits), -1), logits[:, classes], "amax")


@torch.no_grad()
def classifier(
    towers: Towers,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template],
    ranks: Ranks | None = None,
) -> Tensor:
    """Class embeddings ``(C, D)``: the normalized mean of each class's unit prompt embeddings, as in CLIP.

    Prompts of all classes are encoded together, by :func:`dive_fast.evaluation.text_features.embed_texts`.

    Args:
        ranks: divide the prompts among them; all ranks must call this. None: this process encodes all prompts.
    """
    if ranks is None:
        ranks = Ranks(0, 1, next(towers.parameters()).device)
    at_once = max(1, PROMPTS_AT_ONCE // max(1, len(templates)))
    weights = []
    for first in range(0, len(class_names), at_once):
        names = class_names[first : first + at_once]
        prompts = [template(name) for name in names for template in templates]
        features = embed_texts(towers, tokenizer, prompts, ranks)
        weights.append(unit(features.view(len(names), len(templates), -1).mean(1)))
    return torch.cat(weights)


def cached_classifier(
    towers: Towers,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template],
    ranks: Ranks,
    folder: Path | None,
) -> Tensor:
    """The result of :func:`classifier`, cached as a file in ``folder``; all ranks must call this.

    The file is named by the hash of :func:`dive_fast.evaluation.feature_identity.classifier_identity`: text tower,
    tokenizer, prompts, precision and kind of device.

    Args:
        folder: None disables the cache.

    Raises:
        ConfigError: the file exists but cannot be read.
        UserError: the folder cannot be written.
    """
    if folder is None:
        return classifier(towers, tokenizer, class_names, templates, ranks)
    key = (
        digest(classifier_identity(towers, tokenizer, class_names, templates, ranks.device))
        if ranks.is_main
        else ""
    )
    key = ranks.broadcast(key)
    path = folder / f"{key[:32]}.safetensors"
    if ranks.broadcast(path.is_file()):
        return _read(path, key, len(class_names), towers.width).to(ranks.device)
    weights = classifier(towers, tokenizer, class_names, templates, ranks)
    # Another process may write the same file at the same time.
    with ranks.raise_on_all(UserError):
        if ranks.is_main:
            with folder_lock(folder, "folder of classifiers", wait=True):
                about = {"key": key, "class_names": json.dumps(list(class_names))}
                with atomic_path(path) as partial:
                    save_file({"weight": weights.cpu().contiguous()}, partial, about)
    return weights


@torch.no_grad()
def prompted_classifier(towers: Towers, tokenizer: Tokenizer, class_names: Sequence[str], ranks: Ranks) -> Tensor:
    """Unit class embeddings ``(C, D)`` by ``towers.prompts``; all ranks must call this, and each encodes a part.

    Raises:
        ConfigError: as :func:`dive_fast.model.learned_prompts.tokenize_classes`.
    """
    classes = tokenize_classes(tokenizer, towers.pooled_at, class_names, towers.prompts.phrase).to(ranks.device)
    if ranks.is_main:
        warn_about_class_texts(class_names, classes.texts, tokenizer)
    features = torch.zeros(len(class_names), towers.width, device=ranks.device)
    share = ranks.local_range(len(class_names))
    for first in range(share.start, share.stop, CLASSES_AT_ONCE):
        rows = range(first, min(first + CLASSES_AT_ONCE, share.stop))
        features[rows.start : rows.stop] = unit(encode_classes(towers, towers.prompts, classes, rows).float())
    if ranks.group is not None:
        dist.all_reduce(features, group=ranks.group)  # each row is nonzero on one rank
    return features


class HeadRows(NamedTuple):
    """A head's rows for the classes of a data set, in the data set's order."""

    weight: Tensor
    """``(C, D)``"""
    bias: Tensor
    """``(C,)``"""
    joined_by: Literal["position", "number", "name"]
    """How classes were matched to rows: in order, by ImageNet's class number, or by class name."""


def select_head_rows(
    head: Head, class_names: Sequence[str], imagenet_rows: Sequence[int] | None = None
) -> HeadRows | None:
    """The head's rows for these classes; None if the head lacks one of them.

    Args:
        imagenet_rows: for each class, its number among ImageNet's 1000. A head with all 1000 is then indexed by
            number, since two of their names in open_clip are "missile".

    Raises:
        ConfigError: two classes of the head, or of the data set, share a name that is needed to select a row.
    """
    if imagenet_rows is not None and head.class_names in (tuple(IMAGENET_CLASSNAMES), synsets()):
        chosen = list(imagenet_rows)
        return HeadRows(head.weight[chosen], head.bias[chosen], "number")
    class_names, head_names = (
        [composed(name) for name in class_names],
        [composed(name) for name in head.class_names],
    )
    if class_names == head_names:
        return HeadRows(head.weight, head.bias, "position")
    rows = {name: row for row, name in enumerate(head_names)}
    if any(name not in rows for name in class_names):
        return None
    for owner, names in (("head", head_names), ("data set", class_names)):
        if duplicates := [name for name in repeated(names) if name in class_names]:
            raise ConfigError(
                f"the {owner} has two classes called {duplicates[0]!r}, so rows of the head cannot be selected by "
                "name; train it on distinct names, or use prompts instead by --head none"
            )
    chosen = [rows[name] for name in class_names]
    return HeadRows(head.weight[chosen], head.bias[chosen], "name")


def first_missing_class(head: Head, class_names: Sequence[str]) -> str:
    """The first of these classes that the head has no row for; there must be one."""
    known = {composed(name) for name in head.class_names}
    return next(name for name in class_names if composed(name) not in known)


def _read(path: Path, key: str, num_classes: int, width: int) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            stored_key = (file.metadata() or {}).get("key")
            weight: Tensor = file.get_tensor("weight")
    except Exception as error:  # safetensors raises many types
        raise ConfigError(f"{path}: cannot read the classifier: {error}; remove the file") from error
    if stored_key != key or weight.shape != (num_classes, width) or not weight.is_floating_point():
        raise ConfigError(f"{path}: the content does not match the file name; remove the file")
    return weight
