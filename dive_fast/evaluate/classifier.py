"""The rows that image features are compared with: class prompts (Eq. 2-3), kept on disk, or a trained head."""

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
from dive_fast.data.prompts import Template, Tokenizer, pack
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, UserError
from dive_fast.evaluate.feature_identity import of_classifier
from dive_fast.identity import digest
from dive_fast.io.atomic_files import atomic_path
from dive_fast.locks import folder_lock
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers, unit

Members = tuple[tuple[int, ...], ...]
"""For each label, the classes that stand for it."""


class Classifier(NamedTuple):
    """Logits of labels: the largest over the classes that stand for each."""

    kind: Literal["prompts", "head"]
    weight: Tensor
    """``(C, D)``: of prompts, unit rows."""
    bias: Tensor | None = None
    """``(C,)``"""
    members: Members | None = None
    """None: class i stands for label i."""

    @property
    def num_labels(self) -> int:
        return len(self.weight) if self.members is None else len(self.members)

    def logits(self, features: Tensor) -> Tensor:
        """``(B, D)`` unit rows -> ``(B, num_labels)``."""
        logits = features @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        if self.members is None:
            return logits
        device = logits.device
        classes = torch.tensor([row for rows in self.members for row in rows], device=device)
        label = torch.tensor([i for i, rows in enumerate(self.members) for _ in rows], device=device)
        best = logits.new_full((len(logits), len(self.members)), -torch.inf)
        return best.scatter_reduce_(1, label.expand(len(logits), -1), logits[:, classes], "amax")


@torch.no_grad()
def classifier(
    towers: Towers,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template],
    ranks: Ranks | None = None,
) -> Tensor:
    """``(C, D)`` unit rows: the mean of each class's unit prompt embeddings, normalised, as in CLIP.

    Args:
        ranks: share the classes among them, all of which call it; None: this one encodes all.
    """
    device = next(towers.parameters()).device
    own = range(len(class_names)) if ranks is None else ranks.local_range(len(class_names))
    weights = torch.zeros(len(class_names), towers.width, device=device, dtype=towers.logit_scale.dtype)
    for row in own:
        tokens = tokenizer([template(class_names[row]) for template in templates])
        text = pack(tokens, towers.pooled_at).to(device)
        embeddings = unit(towers.encode_text(text.tokens, text.length))[text.index]
        weights[row] = unit(embeddings.mean(0))
    if ranks is not None and ranks.group is not None:
        dist.all_reduce(weights, group=ranks.group)  # every row is zero on all ranks but one
    return weights


def cached_classifier(
    towers: Towers,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template],
    ranks: Ranks,
    folder: Path | None,
) -> Tensor:
    """What :func:`classifier` gives, from ``folder`` if it has been computed before; all ranks call it.

    A file is found again by all that decides its rows (:func:`dive_fast.evaluate.feature_identity.of_classifier`): the
    text tower, the tokenizer, every prompt, the precision and the kind of device. None: nothing is kept.

    Raises:
        ConfigError: the file is there and cannot be read.
        UserError: the folder cannot be written.
    """
    if folder is None:
        return classifier(towers, tokenizer, class_names, templates, ranks)
    key = digest(of_classifier(towers, tokenizer, class_names, templates, ranks.device)) if ranks.is_main else ""
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


class HeadRows(NamedTuple):
    """A head's rows for the classes of a data set, in the data set's order."""

    weight: Tensor
    """``(C, D)``"""
    bias: Tensor
    """``(C,)``"""
    joined_by: Literal["position", "number", "name"]
    """How they were found: all rows in their order, by ImageNet's numbering, or by class name."""


def of_head(head: Head, class_names: Sequence[str], imagenet_rows: Sequence[int] | None = None) -> HeadRows | None:
    """The head's rows for these classes; None where it lacks one of them.

    Args:
        imagenet_rows: for each class, which of ImageNet's 1000 it is. A head of all 1000 is then read by number:
            its names, open_clip's, have two classes called "missile".

    Raises:
        ConfigError: two classes of the head, or of the data set, share a name that is needed to find a row.
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
        if twice := [name for name in repeated(names) if name in class_names]:
            raise ConfigError(
                f"the {owner} has two classes called {twice[0]!r}, so rows of the head cannot be found by name; "
                "train it on names that differ, or leave it out by --head none"
            )
    chosen = [rows[name] for name in class_names]
    return HeadRows(head.weight[chosen], head.bias[chosen], "name")


def lacked(head: Head, class_names: Sequence[str]) -> str:
    """The first of the classes that a head has no row for."""
    known = {composed(name) for name in head.class_names}
    return next(name for name in class_names if composed(name) not in known)


def _read(path: Path, key: str, num_classes: int, width: int) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("key")
            weight: Tensor = file.get_tensor("weight")
    except Exception as error:  # safetensors has an error of its own for each way to be broken
        raise ConfigError(f"{path}: cannot read the classifier: {error}; remove the file") from error
    if found != key or weight.shape != (num_classes, width) or not weight.is_floating_point():
        raise ConfigError(f"{path}: not the classifier that its name says; remove the file")
    return weight
