"""Zero-shot classification: class prompts make the classifier, the nearest class wins (Eq. 2-3)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.config import EvaluateConfig, EvaluationSet
from dive_fast.data.loader import Options, batches_of
from dive_fast.data.prompts import Template, Tokenizer, check_labels, pack, read_class_names, read_templates
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.sets import open_target
from dive_fast.data.source import Source
from dive_fast.evaluate.head import Head
from dive_fast.ranks import Ranks
from dive_fast.towers import Towers, unit


@torch.no_grad()
def classifier(
    towers: Towers, tokenizer: Tokenizer, class_names: Sequence[str], templates: Sequence[Template]
) -> Tensor:
    """``(C, D)`` unit rows: the mean of each class's unit prompt embeddings, normalised, as in CLIP."""
    device = next(towers.parameters()).device
    rows = []
    for name in class_names:
        text = pack(tokenizer([template(name) for template in templates]), towers.pooled_at).to(device)
        embeddings = unit(towers.encode_text(text.tokens, text.length))[text.index]
        rows.append(unit(embeddings.mean(0)))
    return torch.stack(rows)


@torch.no_grad()
def accuracy(
    towers: Towers,
    weights: Tensor,
    samples: EvaluationSamples,
    ranks: Ranks,
    batch_size: int,
    workers: int,
    bias: Tensor | float = 0.0,
) -> float:
    """Share of images whose nearest class is theirs, over all ranks.

    Args:
        weights: what :func:`classifier` gave.
        batch_size: images encoded at once on each rank.
    """
    count = len(samples.source)
    right = torch.zeros((), dtype=torch.float64, device=ranks.device)
    places = [(0, sample) for sample in ranks.share(count)]
    for batch in batches_of(samples, places, batch_size, Options(workers=workers, device=ranks.device)):
        batch = batch.to(ranks.device)
        logits = unit(towers.encode_image(batch.images)) @ weights.T + bias
        right += (logits.argmax(1) == batch.labels).sum()
    if ranks.group is not None:
        dist.all_reduce(right, group=ranks.group)
    return float(right) / count


def open_set(config: EvaluationSet) -> tuple[Source, tuple[str, ...], tuple[Template, ...]]:
    """Samples, class names and templates of an evaluation set.

    Raises:
        DataError: something of it is missing, or a label has no class name.
    """
    source = open_target(config)
    names = read_class_names(config.class_names) if config.class_names is not None else source.class_names
    check_labels(source, names)
    return source, names, read_templates(config.templates)


def evaluate(
    towers: Towers, tokenizer: Tokenizer, config: EvaluateConfig, ranks: Ranks, head: Head | None = None
) -> dict[str, float]:
    """Accuracy on every set of the config: name -> share in [0, 1].

    Args:
        head: classifies the sets whose classes it has, in the place of prompts.
    """
    results = {}
    for name, evaluation in config.sets.items():
        source, class_names, templates = open_set(evaluation)
        samples = EvaluationSamples(source, towers.preprocess)
        bias: Tensor | float = 0.0
        if head is not None and set(class_names) <= set(head.class_names):
            rows = [head.class_names.index(one) for one in class_names]
            weights, bias = head.weight[rows].to(ranks.device), head.bias[rows].to(ranks.device)
        else:
            weights = classifier(towers, tokenizer, class_names, templates)
        results[name] = accuracy(towers, weights, samples, ranks, config.batch_size, config.workers, bias)
    return results
