"""Evaluation of one model on many sets; results with an unchanged identity are reused, not measured again."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.config.schema import EvaluationSet, Loader
from dive_fast.data.sources.vqa_json import vqa_prompt
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError, UserError
from dive_fast.evaluation import calibration
from dive_fast.evaluation.classifier import HeadRows, first_missing_class, select_head_rows
from dive_fast.evaluation.datasets.catalog import canonical_name, find_dataset
from dive_fast.evaluation.datasets.evaluation_set import Asked, Captioned, EvaluatedSet, Labelled
from dive_fast.evaluation.datasets.resolve import Opened, metric_of, open_sets
from dive_fast.evaluation.datasets.set_loader import loader_of, remark_on_loaders
from dive_fast.evaluation.feature_identity import features_identity, prompts_digest
from dive_fast.evaluation.results import Results
from dive_fast.evaluation.tables import Row
from dive_fast.evaluation.zero_shot import measure
from dive_fast.identity import Identity, differences, digest
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers

logger = logging.getLogger(__name__)

SHOWN_VERSIONS = ("dive_fast", "torch", "open_clip_torch")
"""Packages whose versions a row has; its identity has all."""


@dataclass(frozen=True)
class Options:
    """Options of an evaluation that are the same for all sets."""

    label: str
    """Name of the model in tables."""
    precision: str
    batch_size: int
    workers: int
    loader: Loader = "plain"
    """Used for the sets that it can read; ``plain`` decodes the others."""
    classifiers: Path | None = None
    """Folder where the embeddings of prompts are cached."""
    force: bool = False
    """Measure sets again even if the results have them."""


def open_all(
    sets: Mapping[str, EvaluationSet], ranks: Ranks, skip_missing: bool = False, place: str = "evaluate.sets"
) -> Opened:
    """Opens every set before a model is built, so that a wrong path is reported within seconds.

    Args:
        skip_missing: leave out sets that cannot be opened, with a message, instead of raising.
        place: config section of the sets, for messages; empty where they are not those of a config.

    Raises:
        ConfigError, DataError: as :func:`dive_fast.evaluation.datasets.resolve.open_evaluation`.
    """
    opened: Opened = {}
    for name, config in sets.items():
        try:
            opened |= open_sets({name: config}, ranks, place)
        except DataError as error:
            if not skip_missing:
                raise
            ranks.print(f"left out: {error}")
    if not opened:
        raise DataError("none of the sets could be opened")
    return opened


def measure_all(
    towers: Towers,
    tokenizer: Tokenizer,
    sets: Mapping[str, EvaluationSet],
    opened: Opened,
    ranks: Ranks,
    results: Results,
    options: Options,
    model_fields: Row,
    head: Head | None = None,
) -> list[Row]:
    """Measures each opened set and adds its row to the results; all ranks must call this, and all get the rows.

    Args:
        model_fields: fields of a row that describe the model.

    Raises:
        ConfigError, DataError: invalid config or data; the message says what to change. Earlier rows remain.
    """
    remark_on_loaders(options.loader, opened, towers.preprocess, ranks)
    by_prompts = "prompts" if towers.prompts is None else "learned prompts"
    set_fields = {name: describe_set(name, sets[name], data, head, by_prompts) for name, data in opened.items()}
    identity_of = shared_identities(towers, tokenizer, opened, ranks, options, head)
    rows: list[Row] = []
    for name, data in opened.items():
        identity = identity_of[name]
        fields = set_fields[name] | {"prompts_digest": identity["classes"].get("prompts", "")}
        metric = str(fields["metric"])
        needed = (metric, *calibration.METRICS, "reliability") if isinstance(data, Labelled) else (metric,)

        def scores(name: str = name, data: EvaluatedSet = data, metric: str = metric) -> Row:
            measured = measure(
                towers,
                tokenizer,
                data,
                ranks,
                batch_size=options.batch_size,
                workers=options.workers,
                loader=options.loader,
                head=head,
                cache=options.classifiers,
                name=name,
            )
            row: Row = {"value": measured.scores[metric]} | measured.scores
            row |= {"samples": measured.samples, "left_out": measured.left_out}
            if measured.reliability is not None:
                row["reliability"] = {field: list(bins) for field, bins in measured.reliability._asdict().items()}
            return row

        rows.append(
            stored_or_measured(
                *(name, ranks, results, options, model_fields, fields, identity, needed, scores, _summary)
            )
        )
    return rows


def stored_or_measured(
    name: str,
    ranks: Ranks,
    results: Results,
    options: Options,
    model_fields: Row,
    fields: Row,
    identity: Identity,
    needed: Sequence[str],
    measure: Callable[[], Row],
    summarize: Callable[[Row], str],
    attack: Row | None = None,
) -> Row:
    """The row of a set, stored with this identity or measured; prints it and adds it to the results.

    All ranks must call this, and all get the row.

    Args:
        model_fields, fields: those that describe the model and the set; they replace stored ones.
        needed: fields that a stored row must have to be used.
        measure: returns the measured fields; all ranks call it, or none.
        summarize: text of a row.
        attack: fields that describe the attack of a row under one.

    Raises:
        ConfigError, DataError: as ``measure``; the results cannot be written.
    """
    key = digest(identity)
    stored: Row | None = ranks.broadcast(results.find(key, options.label, name, needed) if ranks.is_main else None)
    if stored is not None and not options.force:
        stored.pop("head_lacks", None)  # from a run with a head that did not classify this set
        row = stored | model_fields | fields
        row["value"] = row.get(row["metric"], row["value"])
        ranks.print(f"{name}: {summarize(row)} (measured before)")
    else:
        started = time.monotonic()
        scores = measure()
        row = model_fields | fields_of_measurement(identity, options, ranks) | fields | (attack or {}) | scores
        row |= {"seconds": round(time.monotonic() - started, 2), "key": key, "identity": identity}
        again = changes(results.latest(options.label, name, attack), identity, needed)
        ranks.print(f"{name}: {summarize(row)}{again}")
    with ranks.raise_on_all(UserError):
        if ranks.is_main:
            results.add(row)
    return row


def shared_identities(
    towers: Towers,
    tokenizer: Tokenizer,
    opened: Opened,
    ranks: Ranks,
    options: Options,
    head: Head | None = None,
) -> dict[str, Identity]:
    """The identity of each set's metrics, computed by the first rank; all ranks must call this, and all get it.

    Raises:
        ConfigError: two classes of the head, or of a set, share a name that is needed to select a row.
    """
    with ranks.raise_on_all(UserError):
        common = features_identity(towers, tokenizer, ranks.device) if ranks.is_main else {}
        scale = float(towers.scale().detach())
        named = common | {"precision": common["precision"] | {"named": options.precision}} if ranks.is_main else {}
        loaders = {name: loader_of(options.loader, data, towers.preprocess).name for name, data in opened.items()}
        local = identities(named, opened, head, scale, loaders) if ranks.is_main else {}
        if ranks.is_main and head is not None and head.trained_with not in ("", common["model"]["weights"]):
            logger.warning(
                "%s: the head was trained with other weights than these; it may not classify their features well",
                options.label,
            )
    shared: dict[str, Identity] = ranks.broadcast(local)
    return shared


def fields_of_measurement(identity: Identity, options: Options, ranks: Ranks) -> Row:
    """The fields of a row that say by what and with which weights a set was measured."""
    return {
        "label": options.label,
        "precision": options.precision,
        "weights_digest": identity["model"]["weights"],
        "data_digest": identity["data"]["content"],
        "ranks": ranks.world_size,
        "device": identity["device"],
        "versions": {package: identity["versions"][package] for package in SHOWN_VERSIONS},
    }


def identities(
    features: Identity, opened: Opened, head: Head | None, scale: float, loaders: Mapping[str, Loader]
) -> dict[str, Identity]:
    """The identity of each set's metrics.

    Args:
        features: identity of the model's features.
        scale: the model's logit scale, with its bound.
        loaders: the loader of each set.
    """
    identity_of = {}
    for name, data in opened.items():
        rows = None
        if head is not None and isinstance(data, Labelled):
            rows = select_head_rows(head, data.class_names, data.imagenet_rows)
        identity_of[name] = features | set_identity(data, rows, scale, loaders[name])
    return identity_of


def set_identity(data: EvaluatedSet, head: HeadRows | None, scale: float, loader: Loader = "plain") -> Identity:
    """The part of the identity that comes from the set: contents, labels, and classes or captions.

    Args:
        head: the head's rows for the set's classes; None if prompts classify.
        scale: the logit scale that the probabilities of prompts depend on.
        loader: decodes the images; another one gives other last bits.
    """
    identity: Identity = {
        "data": {
            "content": data.source.digest(),
            "modified": data.source.modified(),
            "samples": len(data.source),
            "layout": data.layout,
            "on_skipped": "report" if data.reports_skipped else "error",
        }
    }
    if loader != "plain":  # a key of its own, so that stored results of earlier versions remain valid
        identity["data"]["loader"] = loader
    if isinstance(data, Asked):
        prompt = vqa_prompt("{question}", "{answer}")
        return identity | {"task": "vqa", "classes": {"answers": data.digest()}, "prompt": prompt}
    if isinstance(data, Captioned):
        return identity | {"task": "retrieval", "classes": {}, "captions": digest(data.captions())}
    regions = None
    if data.regions is not None:
        regions = digest([data.regions.of_sample.tolist(), data.regions.names, data.regions.left_out])
    identity["data"] |= {
        "labels": digest(data.source.samples.labels.tolist()),
        "border": data.border,
        "regions": regions,
    }
    classes: Identity = {"names": digest(data.class_names), "members": digest(data.members)}
    if head is None:
        prompts = prompts_digest(data.class_names, data.templates)
        classes |= {"classifier": "prompts", "prompts": prompts, "logit_scale": scale}
    else:
        # Prompts do not matter where a head classifies.
        classes |= {"classifier": "head", "rows": digest([head.weight.tolist(), head.bias.tolist()])}
    return identity | {"task": "classification", "classes": classes}


def describe_set(
    name: str, config: EvaluationSet, data: EvaluatedSet, head: Head | None, by_prompts: str = "prompts"
) -> dict[str, Any]:
    """The fields of a row that describe the set and its classifier.

    Args:
        by_prompts: name of the classifier where no head classifies.
    """
    # The results of a part of the classes are not those of the known set.
    dataset = config.dataset if config.classes == "all" else None
    known = find_dataset(dataset) if dataset is not None else None
    fields: dict[str, Any] = {
        "set": name,
        "dataset": None if dataset is None else canonical_name(dataset),
        "title": known.title if known is not None else name,
        "role": config.role or (known.role if known is not None else None),
        "metric": metric_of(config),
        "path": config.path,
        "layout": data.layout,
    }
    if isinstance(data, Asked):
        return fields | {"classifier": "ranked answers", "candidates": len(data.candidates)}
    if isinstance(data, Captioned):
        return fields | {"classifier": "captions", "captions": sum(len(texts) for texts in data.captions())}
    fields |= {} if config.classes == "all" else {"part": config.classes}
    fields |= {"classes": data.num_labels, "templates": len(data.templates)}
    rows = None if head is None else select_head_rows(head, data.class_names, data.imagenet_rows)
    if head is None:
        return fields | {"classifier": by_prompts}
    if rows is None:
        return fields | {"classifier": by_prompts, "head_lacks": first_missing_class(head, data.class_names)}
    head_rows = f"{len(rows.weight)} of {len(head.bias)} rows, by {rows.joined_by}"
    return fields | {"classifier": "head", "head_rows": head_rows}


def changes(latest: Row | None, identity: Identity, needed: Sequence[str]) -> str:
    """The reason why a set that was measured before under the same label is measured again.

    Args:
        needed: fields that a stored row must have to be used.
    """
    if latest is None or not isinstance(latest.get("identity"), dict):
        return ""
    # Only keys: most values are hashes.
    if changed := ", ".join(difference.key for difference in differences(latest["identity"], identity)):
        return f" (measured again: {changed} changed)"
    missing = ", ".join(field for field in needed if field not in latest)
    return f" (measured again: the stored row has no {missing})" if missing else ""


def _summary(row: Row) -> str:
    text = f"{row['metric']} {100 * row['value']:.2f} % of {row['samples']} samples"
    if "ece" in row:
        text += f", ECE {row['ece']:.3f}"
    if row.get("left_out"):
        text += f", {row['left_out']} left out"
    if "upper_bound" in row:
        text += (
            f", {row['candidates']} candidates, which allow {100 * row['upper_bound']:.2f} %: "
            f"{100 * row['unanswerable']:.2f} % of the questions have no answer among them"
        )
    if row["classifier"] == "learned prompts":
        text += ", by learned prompts"
    elif row["classifier"] == "head":
        text += f", by the head ({row['head_rows']})"
    elif "head_lacks" in row:
        text += f", by prompts: the head has no class {row['head_lacks']!r}"
    return text
