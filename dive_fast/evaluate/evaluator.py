"""Measures a model on many sets and keeps what was found; a measurement that has been made is not made again."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.config.schema import EvaluationSet
from dive_fast.data.prompts import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError, UserError
from dive_fast.evaluate.classifier import HeadRows, lacked, of_head
from dive_fast.evaluate.datasets.catalog import canonical, find
from dive_fast.evaluate.datasets.evaluation_set import Captioned, Labelled
from dive_fast.evaluate.datasets.resolve import Opened, metric_of, open_sets
from dive_fast.evaluate.feature_identity import of_model, prompts_digest
from dive_fast.evaluate.results import Results, Row
from dive_fast.evaluate.zero_shot import measure
from dive_fast.identity import Identity, differences, digest
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers

logger = logging.getLogger(__name__)

SHOWN_VERSIONS = ("dive_fast", "torch", "open_clip_torch")
"""Packages whose version a row names."""


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
            opened |= open_sets({name: config}, ranks)
        except DataError as error:
            if not skip_missing:
                raise
            ranks.print(f"left out: {error}")
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
    described = {name: _describe(name, sets[name], data, head) for name, data in opened.items()}
    with ranks.raise_on_all(UserError):
        common = of_model(towers, tokenizer, ranks.device) if ranks.is_main else {}
        found = _identities(common, opened, options, head) if ranks.is_main else {}
        if ranks.is_main and head is not None and head.trained_with not in ("", common["model"]["weights"]):
            logger.warning(
                "%s: the head was trained with other weights than these, whose features it may not classify well",
                options.label,
            )
    identities: dict[str, Identity] = ranks.broadcast(found)
    rows: list[Row] = []
    for name, data in opened.items():
        identity = identities[name]
        about_set = described[name] | {"prompts_digest": identity["classes"].get("prompts", "")}
        key = digest(identity)
        metric = str(about_set["metric"])
        before = ranks.broadcast(results.known(key, options.label, name, metric) if ranks.is_main else None)
        if before is not None and not options.again:
            before.pop("head_lacks", None)  # it may have been measured with a head, which decided nothing
            row = before | about | about_set | {"value": before[metric]}
            ranks.print(f"{name}: {_figure(row)} (measured before)")
        else:
            started = time.monotonic()
            measured = measure(
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
            row = about | {
                "label": options.label,
                "precision": options.precision,
                "weights_digest": identity["model"]["weights"],
                "data_digest": identity["data"]["content"],
                "ranks": ranks.world_size,
                "device": identity["device"],
                "versions": {part: identity["versions"][part] for part in SHOWN_VERSIONS},
            }
            row |= about_set | {"value": measured.scores[metric]} | measured.scores
            row |= {
                "samples": measured.samples,
                "left_out": measured.left_out,
                "seconds": round(time.monotonic() - started, 2),
                "key": key,
                "identity": identity,
            }
            ranks.print(f"{name}: {_figure(row)}{_why_again(results.last(options.label, name), identity)}")
        rows.append(row)
        with ranks.raise_on_all(UserError):
            if ranks.is_main:
                results.add(row)
    return rows


def _identities(common: Identity, opened: Opened, options: Options, head: Head | None) -> dict[str, Identity]:
    """What decides the figures of each set.

    Args:
        common: of the model.
    """
    common = common | {"precision": common["precision"] | {"named": options.precision}}
    found = {}
    for name, data in opened.items():
        rows = None
        if head is not None and isinstance(data, Labelled):
            rows = of_head(head, data.class_names, data.imagenet_rows)
        found[name] = common | _set_identity(data, rows)
    return found


def _set_identity(data: Labelled | Captioned, head: HeadRows | None) -> Identity:
    """What decides the figures of a set, beside the model.

    Args:
        head: its rows for the set's classes; None where prompts classify.
    """
    about: Identity = {
        "data": {
            "content": data.source.digest(),
            "modified": data.source.modified(),
            "samples": len(data.source),
            "layout": data.layout,
            "on_skipped": "report" if data.reports_skipped else "error",
        }
    }
    if isinstance(data, Captioned):
        return about | {"task": "retrieval", "classes": {}, "captions": digest(data.captions())}
    regions = None
    if data.regions is not None:
        regions = digest([data.regions.of_sample.tolist(), data.regions.names, data.regions.left_out])
    about["data"] |= {
        "labels": digest([sample.label for sample in data.source.samples]),
        "border": data.border,
        "regions": regions,
    }
    classes: Identity = {"names": digest(data.class_names), "members": digest(data.members)}
    if head is None:
        classes |= {"classifier": "prompts", "prompts": prompts_digest(data.class_names, data.templates)}
    else:
        # Prompts decide nothing where a head classifies.
        classes |= {"classifier": "head", "rows": digest([head.weight.tolist(), head.bias.tolist()])}
    return about | {"task": "classification", "classes": classes}


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
    }
    if isinstance(data, Captioned):
        return found | {"classifier": "captions", "captions": sum(len(own) for own in data.captions())}
    found |= {"classes": data.num_labels, "templates": len(data.templates)}
    rows = None if head is None else of_head(head, data.class_names, data.imagenet_rows)
    if head is None:
        return found | {"classifier": "prompts"}
    if rows is None:
        return found | {"classifier": "prompts", "head_lacks": lacked(head, data.class_names)}
    by = f"{len(rows.weight)} of {len(head.bias)} rows, by {rows.joined_by}"
    return found | {"classifier": "head", "head_rows": by}


def _why_again(last: Row | None, identity: Identity) -> str:
    """What has changed since the same set was measured under the same label."""
    if last is None or not isinstance(last.get("identity"), dict):
        return ""
    # Most values are hashes, which say nothing.
    changed = ", ".join(difference.key for difference in differences(last["identity"], identity))
    return f" (measured again: {changed} changed)" if changed else ""


def _figure(row: Row) -> str:
    figure = f"{row['metric']} {100 * row['value']:.2f} % of {row['samples']} samples"
    if row.get("left_out"):
        figure += f", {row['left_out']} left out"
    if row["classifier"] == "head":
        figure += f", by the head ({row['head_rows']})"
    elif "head_lacks" in row:
        figure += f", by prompts: the head has no class {row['head_lacks']!r}"
    return figure
