"""The initial classification head of a run, with linear probing.

Linear probing (Kumar et al. 2022) trains only the head. The image tower is frozen, so each image is embedded once
and every epoch runs on the embeddings.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dive_fast.config.schema import Config
from dive_fast.data.classes import check_labels
from dive_fast.data.loaders.loader import Options, batches_of, loader_options
from dive_fast.data.prompt_files import read_templates
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.engine.optimizer import learning_rate_schedule
from dive_fast.evaluation.classifier import classifier
from dive_fast.methods import registry
from dive_fast.methods.method import HeadOptions
from dive_fast.model.towers import Towers, tokenizer_of, unit


def make_head(
    config: Config, towers: Towers, source: Source, class_names: Sequence[str], ranks: Ranks, is_trained: bool
) -> nn.Linear:
    """A head for the target's classes, initialized and probed as the method's options say.

    Args:
        towers: the pre-trained towers; moved to the device.
        is_trained: whether the head's weights come from a checkpoint; it is left as constructed.

    Raises:
        DataError: a sample's label has no class name.
    """
    check_labels(source, class_names)
    options = registry.target_options(config.objective)
    if not isinstance(options, HeadOptions):
        options = HeadOptions()
    data, train = config.data.target, config.train
    head = nn.Linear(towers.width, len(class_names))
    if is_trained:
        return head
    towers = towers.to(ranks.device).eval().set_precision(train.precision)
    if options.head_start == "zero_shot":
        templates = read_templates(data.templates)
        weight = classifier(towers, tokenizer_of(config.model), class_names, templates, ranks)
        with torch.no_grad():
            head.weight.copy_(weight * towers.scale())
            head.bias.zero_()
    if options.probe:
        samples, loader = EvaluationSamples(source, towers.preprocess), loader_options(config, data, ranks)
        rows, labels = embed(towers, samples, ranks, config.evaluate.batch_size, loader)
        loss = probe(
            head,
            rows,
            labels,
            ranks,
            epochs=options.probe_epochs,
            learning_rate=options.probe_learning_rate,
            weight_decay=train.weight_decay,
            batch_size=data.batch_size,
            seed=train.seed,
        )
        ranks.print(f"linear probe: cross-entropy {loss:.3f} in the last of {options.probe_epochs} epochs")
    return head


@torch.no_grad()
def embed(
    towers: Towers, samples: EvaluationSamples, ranks: Ranks, batch_size: int, options: Options
) -> tuple[Tensor, Tensor]:
    """Unit image features ``(N, D)`` and labels ``(N,)`` of a labelled set, complete on every rank."""
    keys = [(0, sample) for sample in ranks.local_range(len(samples.source))]
    rows, labels = [], []
    with ranks.progress(len(keys), "embed the target set", "image") as bar:
        for batch in batches_of(samples, keys, batch_size, options):
            batch = batch.to(ranks.device)
            rows.append(unit(towers.encode_image(batch.images)))
            labels.append(batch.labels)
            bar.update(len(batch.labels))
    return ranks.gather(torch.cat(rows)), ranks.gather(torch.cat(labels))


def probe(
    head: nn.Linear,
    rows: Tensor,
    labels: Tensor,
    ranks: Ranks,
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> float:
    """Trains a head with AdamW on cross-entropy, with cosine decay to zero; returns the last epoch's mean loss.

    Every rank runs all steps; at the end the weights of rank 0 are broadcast.

    Args:
        head: trained in place.
        rows: ``(N, D)`` unit image features.
        labels: ``(N,)`` int64.
    """
    head.to(rows.device)
    steps = -(-len(rows) // batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    factor = learning_rate_schedule(0, epochs * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), device=rows.device)
    with ranks.progress(epochs, "linear probe", "epoch") as bar:
        for _ in range(epochs):
            total.zero_()
            for batch in torch.randperm(len(rows), generator=generator).to(rows.device).split(batch_size):
                loss = nn.functional.cross_entropy(head(rows[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach() * len(batch)
            bar.update()
    if ranks.group is not None:
        for parameter in head.parameters():
            dist.broadcast(parameter.detach(), 0, group=ranks.group)
    return float(total) / len(rows)
