"""The classification head of vanilla fine-tuning and LP-FT: how it starts, and linear probing.

Linear probing (Kumar et al. 2022) trains the head alone. The tower is frozen meanwhile, so each image is embedded
once and every epoch works on the embeddings.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dive_fast.config.schema import Config
from dive_fast.data.loaders.loader import Options, batches_of, loader_options
from dive_fast.data.prompts import check_labels, read_templates
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.engine.optimizer import learning_rate_schedule
from dive_fast.evaluate.classifier import classifier
from dive_fast.methods import registry
from dive_fast.methods.linear_head import CrossEntropy
from dive_fast.model.towers import AUTOCAST, Towers, tokenizer_of, unit


def make_head(
    config: Config, towers: Towers, source: Source, class_names: Sequence[str], ranks: Ranks, is_trained: bool
) -> nn.Linear:
    """A head for the target's classes, as ``objective.head_start`` says, and for LP-FT probed.

    Args:
        towers: as pre-trained; moved to the device.
        is_trained: a checkpoint will fill the head.

    Raises:
        DataError: a sample's label has no class name.
    """
    check_labels(source, class_names)
    options = registry.target_options(config.objective)
    assert isinstance(options, CrossEntropy.Options)
    data, train = config.data.target, config.train
    head = nn.Linear(towers.width, len(class_names))
    if is_trained:
        return head
    towers = towers.to(ranks.device).eval()
    towers.autocast = AUTOCAST[train.precision]
    if options.head_start == "zero_shot":
        templates = read_templates(data.templates)
        weight = classifier(towers, tokenizer_of(config.model), class_names, templates, ranks)
        with torch.no_grad():
            head.weight.copy_(weight * towers.scale())
            head.bias.zero_()
    if options.probe:
        samples, loading = EvaluationSamples(source, towers.preprocess), loader_options(config, data, ranks)
        rows, labels = embed(towers, samples, ranks, config.evaluate.batch_size, loading)
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
    """Unit features of a labelled set, ``(N, D)``, and its labels, ``(N,)``; all of them on every rank."""
    share = ranks.local_range(len(samples.source))
    places = [(0, sample) for sample in share]
    rows, labels = [], []
    with ranks.progress(len(share), "embed the target set", "image") as bar:
        for batch in batches_of(samples, places, batch_size, options):
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
    """Trains a head by AdamW on cross-entropy, cosine decay to zero; returns the last epoch's mean loss.

    Every rank does all of it and ends with the first one's bits.

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
            for chosen in torch.randperm(len(rows), generator=generator).to(rows.device).split(batch_size):
                loss = nn.functional.cross_entropy(head(rows[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach() * len(chosen)
            bar.update()
    if ranks.group is not None:
        for parameter in head.parameters():
            dist.broadcast(parameter.detach(), 0, group=ranks.group)
    return float(total) / len(rows)
