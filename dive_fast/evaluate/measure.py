"""Measures a model on many sets and keeps what was found; a measurement that has been made is not made again."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dive_fast.config import EvaluationSet
from dive_fast.data.prompts import Tokenizer
from dive_fast.data.source import DataError
from dive_fast.evaluate.classifier import digest_of, of_head, prompts_digest
from dive_fast.evaluate.head import Head
from dive_fast.evaluate.labelled import Captioned, Labelled
from dive_fast.evaluate.results import Results, Row
from dive_fast.evaluate.suites import canonical, find
from dive_fast.evaluate.zero_shot import measure, metric_of, open_evaluation
from dive_fast.ranks import Ranks
from dive_fast.teacher.fingerprint import weights_digest
from dive_fast.towers import Towers

Opened = dict[str, Labelled | Captioned]


@dataclass(frozen=True)
class Options:
    """How it is measured."""

    label: str
    """What tables call the model."""
    precision: str
    batch_size: int
    workers: int
    classifiers: Path | None = None
    """Folder where the embeddings of prompts are kept."""
    again: bool = False
    """Whether to measure what has been measured."""


def open_all(sets: Mapping[str, EvaluationSet], ranks: Ranks, skip_missing: bool = False) -> Opened:
    """Opens every set before a model is built, so that a wrong path costs seconds.

    Args:
        skip_missing: leave out the sets that cannot be opened, and say so.

    Raises:
        ConfigError, DataError: as :func:`open_evaluation`.
    """
    opened: Opened = {}
    for name, config in sets.items():
        try:
            opened[name] = open_evaluation(config)
        except DataError as error:
            if not skip_missing:
                raise
            ranks.say(f"left out: {error}")
    if not opened:
        raise DataError("none of the sets is there")
    return opened


def measure_all(
    towers: Towers,
    tokenizer: Tokenizer,
    sets: Mapping[str, EvaluationSet],
    opened: Opened,
    ranks: Ranks,
    results: Results,
    options: Options,
    about: Row,
    head: Head | None = None,
) -> list[Row]:
    """Measures each opened set and adds its row; all ranks call it and get the rows.

    Args:
        about: what rows say of the model beside what is found out here.

    Raises:
        ConfigError, DataError: the user's to mend; rows until then are kept.
    """
    digest = weights_digest(towers)
    common = about | {
        "label": options.label,
        "precision": options.precision,
        "weights_digest": digest,
        "ranks": ranks.world_size,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "versions": {name: metadata.version(name) for name in ("dive_fast", "torch", "open_clip_torch")},
    }
    rows: list[Row] = []
    for name, data in opened.items():
        described = _describe(name, sets[name], data, head)
        head_digest = _head_digest(head) if described["classifier"] == "head" else ""
        # The prompts decide nothing where a head classifies.
        prompts = "" if head_digest else described["prompts_digest"]
        key = digest_of(
            digest, head_digest, prompts, described["data_digest"], options.precision, towers.preprocess
        )
        known = [None if options.again else results.known(key, options.label, name)]
        if ranks.group is not None:
            dist.broadcast_object_list(known, src=0, group=ranks.group)
        if known[0] is not None:
            row = known[0] | about | described | {"value": known[0][str(described["metric"])]}
            ranks.say(f"{name}: {_figure(row)} (measured before)")
        else:
            started = time.monotonic()
            found = measure(
                towers,
                tokenizer,
                data,
                ranks,
                batch_size=options.batch_size,
                workers=options.workers,
                head=head,
                cache=options.classifiers,
                name=name,
            )
            seconds = round(time.monotonic() - started, 2)
            value = found.scores[str(described["metric"])]
            row = common | described | {"value": value} | found.scores | {"seconds": seconds, "key": key}
            ranks.say(f"{name}: {_figure(row)}")
        rows.append(row)
        if ranks.first:
            results.add(row)
    return rows


def _describe(name: str, config: EvaluationSet, data: Labelled | Captioned, head: Head | None) -> dict[str, Any]:
    known = find(config.dataset) if config.dataset is not None else None
    found: dict[str, Any] = {
        "set": name,
        "dataset": None if config.dataset is None else canonical(config.dataset),
        "title": known.title if known is not None else name,
        "role": config.role or (known.role if known is not None else None),
        "metric": metric_of(config),
        "path": config.path,
        "layout": data.layout,
        "samples": len(data.source),
    }
    samples = data.source.samples
    content = data.source.content or digest_of([(s.key, s.size, s.label, s.texts) for s in samples])
    if isinstance(data, Captioned):
        return found | {"classifier": "captions", "prompts_digest": "", "data_digest": content}
    regions = None if data.regions is None else (data.regions.of_sample.tolist(), data.regions.names)
    by_head = head is not None and of_head(head, data.class_names) is not None
    return found | {
        "classes": len(data.class_names if data.members is None else data.members),
        "classifier": "head" if by_head else "prompts",
        "templates": len(data.templates),
        "prompts_digest": prompts_digest(data.class_names, data.templates),
        "data_digest": digest_of(content, data.members, data.border, regions),
    }


def _head_digest(head: Head | None) -> str:
    assert head is not None
    return digest_of(head.weight.tolist(), head.bias.tolist(), head.class_names)


def _figure(row: Row) -> str:
    return f"{row['metric']} {100 * row['value']:.2f} % of {row['samples']} samples"
