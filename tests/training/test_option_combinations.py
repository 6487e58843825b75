"""Runs of two steps, with a checkpoint and a resume, that combine every two values of all enumerated options.

Options and values are those of the config's schema and the methods. One whose values are neither
flags nor words must be listed here.
"""

import contextlib
import functools
import itertools
import json
import shutil
import traceback
import types
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import datasets
import numpy as np
import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file

from dive_fast.config.schema import Config
from dive_fast.config.section import section_type, sections
from dive_fast.data.prepared import convert, raw
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.demo.pretrain import write_tokenizer
from dive_fast.distributed import Ranks, join
from dive_fast.engine import update
from dive_fast.errors import ConfigError
from dive_fast.methods import method, registry
from dive_fast.methods.run_config import RunConfig, load_run_config
from dive_fast.projections import rules as projections
from dive_fast.training import loop as train

Value = Any
Row = Mapping[str, Value]
"""Dotted key -> value."""

RANKS, STAGE, REFERENCE, SETS = "ranks", "deepspeed.zero_optimization.stage", "data.reference", "evaluate.sets"
SEEN, OTHER = ["seen"], ["other"]

PRESETS, TARGETS = registry.table().presets, registry.table().targets
RULES = projections.table()

COMBINED = tuple(name for name in PRESETS if name not in ("coop", "kgcoop"))
"""Methods that are combined. CoOp and KgCoOp lack ContCoOp's attention: in tests/engine/test_prompt_step.py."""

VALUES: dict[str, tuple[Value, ...]] = {
    "objective.name": COMBINED,
    "model.name": ("clip", "siglip", "dropping"),
    "model.logit_scale_max": (None, 10.0),
    "data.target.templates": ("simple", "a photo of a {}"),
    "data.target.workers": (0, 1),
    "data.target.text_length": (None, 8),
    "data.target.crop_scale": ([0.9, 1.0], [0.3, 0.8]),
    "data.target.horizontal_flip": (0.0, 0.5),
    "data.reference.workers": (0, 1),
    "data.reference.text_length": (None, 8),
    "data.reference.views": ("eval", 2),
    "objective.weight": (None, 1.0),
    "objective.reference_every": (1, 2),
    "objective.average_weight": (1.0, 0.0),
    "objective.pairwise_weight": (1.0, 0.0),
    "objective.teacher_every": (1, 2),
    "teacher.path": (None, "shared"),
    "teacher.audit": (64, 0),
    "teacher.tolerance": (None, 1e-2),
    "train.max_steps": (None, 2),
    "model.freeze": ([], ["*.positional_embedding"]),
    "train.micro_batch_size": (None, 3),
    "train.layer_decay": (None, 0.5),
    "train.warmup_steps": (0, 1),
    "train.trace_steps": (0, 1),
    "train.ema": (None, 0.5),
    "train.resume": ("auto", "never", "path"),
    "evaluate.every_steps": (None, 1),
    "evaluate.every_epochs": (None, 1),
    "evaluate.during": (None, SEEN, OTHER),
    "evaluate.select": (None, "seen"),
    "evaluate.patience": (None, 1),
    "evaluate.probe": (500, 0),
    "evaluate.workers": (0, 1),
}
"""Values, of options that the schema does not enumerate, that take different paths through the code."""

FEWER: dict[str, tuple[Value, ...]] = {
    **dict.fromkeys(
        ("data.target.format", "data.reference.format", "evaluate.geometry.format"),
        ("folder", "webdataset", "csv", "prepared"),
    ),
    "evaluate.sets.<name>.format": ("folder", "webdataset", "huggingface", "prepared"),
    "evaluate.sets.<name>.task": ("classification", "retrieval"),
}
"""Values of options of which the schema enumerates more. A fifth format would add a fourth of all rows, and an
opened `huggingface` set is like an opened `webdataset`: byte ranges of files. Evaluation sets have it, and
tests/training/test_inputs.py trains on it. Questions are pairs like
those of `csv`: tests/evaluation/test_visual_questions.py trains on them and measures them."""

CONSTANT = {
    # Locations, whose kinds `format` covers.
    "data.target.path",
    "data.target.image_root",
    "data.target.class_names",
    "data.reference.path",
    "data.reference.image_root",
    *(f"{section}.{key}" for section in ("data.target", "data.reference") for key in ("split", "image_column")),
    *("data.target.label_column", "data.target.text_column", "data.reference.text_column"),
    "evaluate.sets.<name>.path",
    "evaluate.sets.<name>.class_names",
    "evaluate.sets.<name>.templates",
    "evaluate.geometry.path",
    "evaluate.geometry.image_root",
    *(f"evaluate.sets.<name>.{key}" for key in ("split", "image_column", "label_column", "text_column")),
    *(f"evaluate.geometry.{key}" for key in ("split", "image_column", "text_column")),
    # Of questions.
    *("data.target.annotations", "data.reference.annotations"),
    *(f"evaluate.sets.<name>.{key}" for key in ("image_root", "annotations", "answers", "questions")),
    "model.pretrained",
    # Adapters, in tests/training/test_lora.py with methods, rules, stages and options of the step.
    *(f"model.lora.{key}" for key in ("rank", "alpha", "dropout", "targets", "towers")),
    # A line of the model card.
    "model.license",
    "train.output",
    # A stream of tars: in test_stream.py.
    *("data.reference.order", "data.reference.stream_buffer"),
    # Numbers, all of which take the same path.
    "data.target.batch_size",
    "data.reference.batch_size",
    "objective.decay",
    "objective.distillation_weight",
    "objective.feature_weight",
    "objective.relational_weight",
    "objective.interactive_weight",
    "objective.cross_weight",
    "objective.projection_weight",
    "objective.orthogonality_weight",
    "objective.kernel_beta",
    "objective.decay_start",
    "objective.decay_end",
    "objective.decay_ramp",
    "objective.backgrounds",
    "objective.random_texts",
    "objective.random_tokens",
    *("objective.attack_eps", "objective.attack_step", "objective.attack_steps"),
    *("objective.frozen_weight", "objective.clean_weight", "objective.weight_perturbation_weight"),
    *(f"objective.perturbation_{key}" for key in ("rank", "size", "steps")),
    *(f"objective.curvature_{key}" for key in ("every", "decay", "low", "high")),
    "objective.gram_weight",
    *("objective.context", "objective.heads", "objective.residual"),
    "objective.probe_epochs",
    "objective.probe_learning_rate",
    # Each row without ZeRO-3 has a rule or none, by turns: all values with all stages would be five times as many
    # choices. Options are in tests/projections and tests/engine/test_weight_projection.py.
    *("projection.name", "projection.cosine", "projection.direction", "projection.form"),
    *("projection.mu", "projection.k", "projection.strength"),
    "teacher.batch_size",
    "train.epochs",
    "train.seed",
    # SGD, which needs ZeRO 0: in test_prompt_runs.py.
    *("train.optimizer", "train.momentum"),
    "train.learning_rate",
    "train.weight_decay",
    "train.betas",
    "train.epsilon",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.nonfinite_limit",
    "train.rank_timeout",
    "evaluate.geometry.pairs",
    "evaluate.batch_size",
    # Loaders of optional packages: in tests/evaluation/datasets/test_set_loader.py.
    "evaluate.loader",
    # A part of the samples, which is read as any other set: in tests/data/test_holdout.py and test_class_parts.py.
    *("data.target.holdout", "data.target.classes", "data.target.shots", "data.target.shots_seed"),
    *("evaluate.sets.<name>.holdout", "evaluate.sets.<name>.classes"),
    # Parts without a method's name: in tests/methods.
    "objective.target",
    "objective.reference",
    # Processes that change no weights: in test_trackers.
    "track",
    # Only for GPUs.
    "data.target.hw_decoder_load",
    "data.reference.hw_decoder_load",
    # Reports, which do not affect weights: in tests/evaluate.
    "evaluate.sets.<name>.dataset",
    "evaluate.sets.<name>.metric",
    "evaluate.sets.<name>.role",
    # Minutes on a CPU: in test_compiled_run_resumes_bit_equal.
    "train.compile",
}

OTHER_AXES: dict[str, tuple[Value, ...]] = {
    RANKS: (1, 2),
    STAGE: (0, 1, 2, 3, "auto"),
    REFERENCE: ("given", "none"),
    SETS: ("given", "none"),
    "evaluate.geometry": ("given", "none"),
}
"""Options that are not a single value of the config."""


class Invalid(NamedTuple):
    """Values that are refused in combination."""

    values: dict[str, tuple[Value, ...]]
    message: str
    """Part of the error message."""


NEED_REFERENCE = tuple(name for name, preset in PRESETS.items() if preset.reference is not None)
WITH_CLASSES = tuple(
    name
    for name, preset in PRESETS.items()
    if name in COMBINED and (TARGETS[preset.target].needs_head or TARGETS[preset.target].needs_classes)
)
ADVERSARIAL = ("grace", "pmg_aft", "tecoa")
WITH_VIEWS = ("grace", "pmg_aft")
WITH_TEACHER = tuple(name for name, preset in PRESETS.items() if TARGETS[preset.target].teacher != "none")
RAW = ("folder", "webdataset", "csv")
NEVER: dict[str, tuple[Value, ...]] = {"evaluate.every_steps": (None,), "evaluate.every_epochs": (None,)}

INVALID = [
    Invalid({"objective.name": NEED_REFERENCE, REFERENCE: ("none",)}, "needs a reference set"),
    Invalid({"objective.name": WITH_CLASSES, "data.target.format": ("csv",)}, "csv has prompts and no classes"),
    Invalid({"objective.name": WITH_TEACHER, STAGE: (3,)}, "a teacher on the target half"),
    Invalid({"objective.name": ADVERSARIAL, STAGE: (3,)}, "which need all weights"),
    Invalid({"objective.name": ("contcoop",), STAGE: (3,)}, "has learned prompts, which need all weights"),
    Invalid({"objective.name": ("contcoop",), "train.ema": (0.5,)}, "trains prompts and no weight of the model"),
    Invalid({"objective.name": WITH_VIEWS, "model.name": ("dropping",)}, "encodes views of images twice"),
    Invalid({"objective.name": ("car_ft",), "data.target.templates": ("a photo of a {}",)}, "at least two"),
    Invalid({"data.target.loader": ("ffcv",), "data.target.format": RAW}, "reads prepared sets alone"),
    Invalid(
        {"data.reference.loader": ("ffcv",), "data.reference.format": RAW, REFERENCE: ("given",)},
        "reads prepared sets alone",
    ),
    Invalid({"model.name": ("dropping",), "train.micro_batch_size": (3,)}, "train.micro_batch_size"),
    Invalid({"evaluate.select": ("seen",), SETS: ("none",)}, "evaluate.sets has no seen"),
    Invalid({"evaluate.during": (SEEN, OTHER), SETS: ("none",)}, "evaluate.sets has no"),
    Invalid({"evaluate.every_steps": (1,), "evaluate.every_epochs": (1,)}, "set only one of them"),
    Invalid({"evaluate.select": ("seen",)} | NEVER, "need every_steps or every_epochs"),
    Invalid({"evaluate.during": (SEEN, OTHER)} | NEVER, "need every_steps or every_epochs"),
    Invalid({"evaluate.during": (OTHER,), "evaluate.select": ("seen",)}, "evaluate.during: add seen"),
    Invalid({"train.keep_best": (True,), "evaluate.select": (None,)}, "train.keep_best needs evaluate.select"),
    Invalid({"evaluate.patience": (1,), "evaluate.select": (None,)}, "evaluate.patience needs evaluate.select"),
    Invalid({"data.target.balance": ("class",), "data.target.format": ("csv",)}, "has prompts and no classes"),
    Invalid({"train.compile": (True,), STAGE: (3,)}, "train.compile: ZeRO-3"),
    Invalid({"train.ema": (0.5,), STAGE: (3,)}, "train.ema: under ZeRO-3"),
    Invalid({"train.export_ema": (True,), "train.ema": (None,)}, "train.export_ema needs train.ema"),
    Invalid({"evaluate.ema": (True,), "train.ema": (None,)}, "evaluate.ema needs train.ema"),
    Invalid({"evaluate.ema": (True,), "train.export_ema": (True,)}, "evaluate.ema: with train.export_ema"),
]
"""All refused combinations; every other one must run."""

SIGLIP = {"model.name": "siglip", "model.random": False, RANKS: 2}
FIRST: list[Row] = [
    # Two parameter groups, which DeepSpeed steps in turn; a bias that is never trained.
    SIGLIP | {STAGE: 1, "train.decay_all_parameters": False},
    SIGLIP | {STAGE: 2, "train.decay_all_parameters": False},
    # Blocks that ZeRO-3 fetches again in the backward, next to a tower without any.
    SIGLIP
    | {STAGE: 3, "train.activation_checkpointing": "full", "objective.name": "snd"}
    | {"train.micro_batch_size": 3},
    {STAGE: 3, RANKS: 2, "train.activation_checkpointing": "full", "objective.name": "vanilla_ft"},
    SIGLIP | {STAGE: 0, "objective.name": "flyp_replay"},
]
"""Combinations of more than two values, tried first and therefore in the quick tests."""


def leaves() -> dict[str, Any]:
    """The annotation of each key of the config that has a value."""
    found = {}
    for place, section in sections(Config, ""):
        for key, field in section.model_fields.items():
            if section_type(field.annotation) is None and (place or key != "deepspeed"):
                found[f"{place}.{key}".lstrip(".")] = field.annotation
    for preset in PRESETS.values():
        for key, part in registry.options_of(preset).items():
            found[f"objective.{key}"] = part.Options.model_fields[key].annotation
    for rule in RULES.values():
        for key, option in rule.Options.model_fields.items():
            found[f"projection.{key}"] = option.annotation
    return found


def enumerated(annotation: Any) -> tuple[Value, ...] | None:
    """All values of an annotation; None if it has values other than words, flags and null."""
    if annotation is bool:
        return (True, False)
    if annotation is type(None):
        return (None,)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return parts
    if origin in (Union, types.UnionType):
        of_parts = [enumerated(part) for part in parts]
        return None if None in of_parts else tuple(itertools.chain(*of_parts))  # type: ignore[arg-type]
    return None


@functools.cache
def axes() -> dict[str, tuple[Value, ...]]:
    """The combined options: option -> values."""
    found: dict[str, tuple[Value, ...]] = dict(OTHER_AXES)
    for key, annotation in leaves().items():
        values = enumerated(annotation)
        if key in CONSTANT:
            continue
        if values is not None and key.startswith("evaluate.sets"):
            values = tuple(value for value in values if value is not None)  # the schema's "as dataset has it"
        found[key] = VALUES.get(key, ()) if values is None else FEWER.get(key, values)
    return found


def test_every_option_is_listed() -> None:
    known = leaves()
    missing = [key for key, values in axes().items() if not values]
    assert not missing, f"name the values of {missing} in VALUES, or put them into CONSTANT with the reason"
    open_keys = {key for key, annotation in known.items() if enumerated(annotation) is None}
    assert VALUES.keys() <= open_keys, "the schema has the values of these itself"
    assert known.keys() >= CONSTANT
    assert not CONSTANT & VALUES.keys()
    for one in INVALID:
        for key, values in one.values.items():
            assert key == "train.compile" or all(value in axes()[key] for value in values), key


# Rows

CONSIDERED = 2000
"""Choices of a group of options that are compared, drawn at random from all that rules allow."""


class Table:
    """All values of all options by number: which pairs are allowed, and which are not yet covered."""

    def __init__(self) -> None:
        """Starts with all pairs uncovered."""
        options = axes()
        self.values = [(key, value) for key in options for value in options[key]]
        self.of_key: dict[str, list[int]] = {key: [] for key in options}
        for number, (key, _) in enumerate(self.values):
            self.of_key[key].append(number)
        key_of = np.array([list(options).index(key) for key, _ in self.values])
        self.uncovered = key_of[:, None] != key_of[None]
        self.rules = [
            [{self.number(key, value) for value in values} for key, values in one.values.items()]
            for one in INVALID
            if one.values.keys() <= options.keys()
        ]
        self.tie = np.random.default_rng(0)
        """Breaks ties at random, which covers more triples than always taking the first."""
        self.parts = [self._may_stand(keys) for keys in connected(options)]
        """For each group of options that rules connect, all allowed choices, one per row."""

    def number(self, key: str, value: Value) -> int:
        return next(n for n in self.of_key[key] if self.values[n] == (key, value))

    def allowed(self, row: set[int]) -> bool:
        return not any(all(row & values for values in rule) for rule in self.rules)

    def _may_stand(self, keys: list[str]) -> Any:
        """One option after the other, so that what a rule refuses is not combined with the options after it."""
        rows, left = np.zeros((1, 0), dtype=np.int16), list(self.rules)
        for count, key in enumerate(keys, 1):
            choices = np.array(self.of_key[key], dtype=np.int16)
            rows = np.column_stack([rows.repeat(len(choices), 0), np.tile(choices, len(rows))])
            known = {number for name in keys[:count] for number in self.of_key[name]}
            for rule in [rule for rule in left if set().union(*rule) <= known]:
                left.remove(rule)
                refused = [np.isin(rows, list(values)).any(1) for values in rule]
                rows = rows[~np.logical_and.reduce(refused)]
        return rows

    def completed(self, *start: int) -> list[int] | None:
        """A row with the values of ``start`` and others that cover many pairs; None if all are refused."""
        row: list[int] = []
        fixed = {self.values[number][0]: number for number in start}
        # Those with a choice left come last, so that they go with what is there.
        for choices in sorted(self.parts, key=lambda choices: len(choices[0]) == 1):
            for at, number in enumerate(choices[0]):
                if (wanted := fixed.get(self.values[number][0])) is not None:
                    choices = choices[choices[:, at] == wanted]
                    if not len(choices):
                        return None
            if len(choices) > CONSIDERED:
                choices = choices[self.tie.integers(len(choices), size=CONSIDERED)]
            placed = [*row, *(number for number in start if number not in row)]
            gain = self.uncovered[choices][:, :, placed].sum((1, 2))
            gain += self.uncovered[choices[:, :, None], choices[:, None]].sum((1, 2)) // 2
            row += choices[(gain + self.tie.random(len(gain))).argmax()].tolist()
        return row

    def take(self, row: list[int]) -> None:
        self.uncovered[np.ix_(row, row)] = False


def connected(options: Mapping[str, Any]) -> list[list[str]]:
    """The options in groups such that no rule involves two groups."""
    group = {key: {key} for key in options}
    for one in INVALID:
        merged = set().union(*(group.get(key, set()) for key in one.values))
        for key in merged:
            group[key] = merged
    found = []
    for key in options:
        if (keys := [other for other in options if other in group[key]]) not in found:
            found.append(keys)
    return found


@functools.cache
def quick_rows() -> list[Row]:
    """Rows that cover every value."""
    return _rows(with_pairs=False)


@functools.cache
def rows() -> list[Row]:
    """Rows that cover every allowed pair of values; the quick ones come first."""
    return _rows(with_pairs=True)


def _rows(with_pairs: bool) -> list[Row]:
    table, chosen = Table(), list[Row]()

    def take(*start: int) -> None:
        if (row := table.completed(*start)) is not None:
            table.take(row)
            chosen.append({key: value for key, value in (table.values[number] for number in sorted(row))})

    for first in FIRST:
        take(*(table.number(key, value) for key, value in first.items()))
    for number, (key, value) in enumerate(table.values):
        if not any(row[key] == value for row in chosen):
            take(number)
    for one, other in np.argwhere(np.triu(table.uncovered)).tolist() if with_pairs else []:
        if table.uncovered[one, other]:
            take(one, other)
    return chosen


def test_quick_rows_cover_every_value() -> None:
    for key, values in axes().items():
        for value in values:
            assert any(row[key] == value for row in quick_rows()), (key, value)


@pytest.mark.slow
def test_rows_cover_every_allowed_pair_of_values() -> None:
    table = Table()
    assert rows()[: len(quick_rows())] == quick_rows()
    for row in rows():
        numbers = [table.number(key, value) for key, value in row.items()]
        assert len(numbers) == len(axes())
        assert table.allowed(set(numbers))
        table.take(numbers)
    for one, other in np.argwhere(np.triu(table.uncovered)).tolist():
        assert table.completed(one, other) is None, (table.values[one], table.values[other])


# Configs


def write_material(folder: Path) -> None:
    """Writes all models and data sets of the rows."""
    words = ["a", "photo", "of", "class", "number", "caption", "and", "so", "on"] + [str(i) for i in range(24)]
    (folder / "tokenizer").mkdir()
    vocabulary = write_tokenizer(folder / "tokenizer", words, context=12)
    text = tiny.TEXT | {"context_length": 12, "vocab_size": vocabulary, "hf_tokenizer_name": "own"}
    model = tiny.CLIP | {"text_cfg": text}
    changes: dict[str, dict[str, Any]] = {
        "clip": {},
        "siglip": {"custom_text": True, "init_logit_bias": -10},
        "dropping": {"vision_cfg": tiny.VISION | {"patch_dropout": 0.5}},
    }
    for name, change in changes.items():
        shutil.copytree(folder / "tokenizer", folder / name)
        tiny.write_model(folder / name, model | change)
    for half, write, text_of in (
        ("target", tiny.write_target, ".cls"),
        ("reference", tiny.write_reference, ".txt"),
    ):
        section = write(folder / half, count=16)
        source = open_webdataset(section["path"], text_of)
        prepare(raw.RawSource(source), folder / f"{half}-prepared", convert.Options("beton"), workers=1)
        lines = ["title\tfilepath"]
        for index, sample in enumerate(source.samples):
            path = folder / f"{half}-folder" / f"class {sample.label}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny.jpeg(index + 1000 * (half == "reference")))
            path.with_suffix(".txt").write_text("\n".join(several_captions(index)))
            lines += [f"{caption}\t{path}" for caption in several_captions(index)]
        (folder / f"{half}.csv").write_text("\n".join(lines) + "\n")
        write_dataset(folder / f"{half}-huggingface", source)


def several_captions(index: int) -> list[str]:
    return [f"caption {index}", f"a photo of number {index}"][: 1 + index % 2]


def write_dataset(folder: Path, source: Source) -> None:
    """Writes a data set of Hugging Face's `datasets`."""
    labels = [max(sample.label, 0) for sample in source.samples]
    names = [f"class number {label}" for label in range(max(labels) + 1)]
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=names),
        "captions": datasets.Sequence(datasets.Value("string")),
    }
    columns = {
        "image": [{"bytes": source.read(row), "path": None} for row in range(len(source))],
        "label": labels,
        "captions": [several_captions(row) for row in range(len(source))],
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)


def data_of(folder: Path, half: str, kind: str) -> dict[str, Any]:
    """Format, path and class names of a half in one of its formats."""
    names = {"class_names": str(folder / "target/classes.txt")} if half == "target" else {}
    path = {
        "webdataset": folder / half,
        "folder": folder / f"{half}-folder",
        "csv": folder / f"{half}.csv",
        "prepared": folder / f"{half}-prepared",
        "huggingface": folder / f"{half}-huggingface",
    }[kind]
    return {"format": kind, "path": str(path)} | (names if kind in ("webdataset", "prepared") else {})


def tree_of(folder: Path, output: Path, row: Row) -> dict[str, Any]:
    """The config of a row; keys that the row leaves open are as small as possible."""
    row = dict(row)
    for key, values in axes().items():
        row.setdefault(key, values[0] if key not in DEFAULTS else DEFAULTS[key])
    tree: dict[str, Any] = {"deepspeed": {"zero_optimization": {}}, "data": {"reference": {}}}
    for key, value in row.items():
        if key in OTHER_AXES and key != STAGE:
            continue
        if key.startswith("evaluate.sets") or key.startswith("evaluate.geometry"):
            continue
        *path, last = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    tree["model"]["name"] = f"local-dir:{folder / row['model.name']}"
    for half in ("target", "reference"):
        tree["data"][half] |= data_of(folder, half, row[f"data.{half}.format"]) | {"batch_size": 8}
    if row[REFERENCE] == "none":
        tree["data"]["reference"] = None
    if row["teacher.path"] is not None:
        tree["teacher"]["path"] = str(output.parent / "teacher")
    # Options that the method lacks are refused.
    preset = PRESETS[row["objective.name"]]
    options = {"name", *registry.options_of(preset)}
    options |= {"weight", "reference_every"} if preset.reference is not None else set()
    if TARGETS[preset.target].needs_adapters:
        tree["model"]["lora"] = {"rank": 2, "towers": ["image"]}
    tree["objective"]["probe_epochs"] = 1
    tree["objective"] = {key: value for key, value in tree["objective"].items() if key in options}
    turn = zlib.crc32(json.dumps(sorted(row.items())).encode())
    has_no_rule = row[STAGE] == 3 or TARGETS[preset.target].needs_prompts
    tree["projection"] = {"name": "none" if has_no_rule else ("none", *RULES)[turn % (1 + len(RULES))]}
    tree["train"] |= {
        "output": str(output),
        "epochs": 1,
        "learning_rate": 1e-3,
        "log_every": 1,
        "checkpoint_every": 1,
        "resume": "auto",
    }
    tree["evaluate"]["sets"] = {}
    if row[SETS] == "given":
        seen = {
            key.removeprefix("evaluate.sets.<name>."): value
            for key, value in row.items()
            if "<name>" in key and key not in CONSTANT
        }
        half = "reference" if seen["task"] == "retrieval" else "target"
        other = data_of(folder, "target", "webdataset") | {"templates": "a photo of a {}"}
        tree["evaluate"]["sets"] = {
            "seen": seen | data_of(folder, half, seen["format"]) | {"templates": "a photo of a {}"},
            "other": other,
        }
        if seen["task"] == "retrieval":
            tree["evaluate"]["sets"]["seen"].pop("class_names", None)
    tree["evaluate"]["geometry"] = None
    if row["evaluate.geometry"] == "given":
        tree["evaluate"]["geometry"] = data_of(folder, "reference", row["evaluate.geometry.format"]) | {"pairs": 5}
    return tree


DEFAULTS: dict[str, Value] = {
    "data.target.format": "webdataset",
    "model.random": False,
    "train.precision": "fp32",
    "train.keep_best": False,
    "train.export_ema": False,
    "evaluate.ema": False,
    "evaluate.sets.<name>.format": "webdataset",
    "evaluate.geometry": "none",
}
"""Values of options whose first value is not the simplest."""


# Runs


@contextlib.contextmanager
def left_after_one_step(run: Path, copy: Path, ranks: Ranks) -> Iterator[None]:
    """Copies the run folder after the checkpoint of the first step, as if the run had been killed there."""
    save = train.Saver.save

    def saved(self: Any, step: int, *states: Any, **options: Any) -> None:
        save(self, step, *states, **options)
        if step == 1:
            self.finish()
            ranks.barrier()
            if ranks.is_main:
                shutil.copytree(run, copy)
            ranks.barrier()

    train.Saver.save = saved  # type: ignore[method-assign]
    try:
        yield
    finally:
        train.Saver.save = save  # type: ignore[method-assign]


def run_row(folder: Path, name: str, row: Row, ranks: Ranks) -> str:
    """Runs a row completely, and again from its first checkpoint; returns the first difference, or nothing."""
    parent = folder / "runs" / name
    complete, again = parent / "complete", parent / "again"
    tree = tree_of(folder, complete, row)
    with left_after_one_step(complete, again, ranks):
        train.train(RunConfig.model_validate_json(json.dumps(tree)), complete, ranks)
    resume = row.get("train.resume", "auto")
    if resume == "path":
        resume = str(again / "checkpoints/step00000001")
        again = parent / "from-path"
    ranks.barrier()
    resumed = tree | {"train": tree["train"] | {"output": str(again), "resume": resume}}
    train.train(RunConfig.model_validate_json(json.dumps(resumed)), again, ranks)
    ranks.barrier()
    if not ranks.is_main:
        return ""
    return differences(complete, again, folder, row)


def differences(complete: Path, again: Path, folder: Path, row: Row) -> str:
    """The first difference between the files of a resumed and an uninterrupted run, or nothing."""
    last = "checkpoints/step00000002"
    for pattern in (
        "model.safetensors",
        "prompts.safetensors",
        "head.safetensors",
        "ema*.safetensors",
        f"{last}/*.safetensors",
    ):
        files = sorted(complete.glob(pattern))
        if [file.relative_to(complete) for file in files] != [
            f.relative_to(again) for f in sorted(again.glob(pattern))
        ]:
            return f"other files {pattern}"
        for file in files:
            expected, found = load_file(file), load_file(again / file.relative_to(complete))
            wrong = [key for key in expected if not torch.equal(expected[key], found[key])]
            if wrong or expected.keys() != found.keys():
                return f"{file.relative_to(complete)}: {len(wrong)} of {len(expected)} differ, as {wrong[:3]}"
    if (complete / "prompts.safetensors").exists():
        moved = load_file(complete / "prompts.safetensors")["attention.output.weight"]
        return "" if bool(moved.any()) and same_metrics(complete, again, row) else "other prompts or metrics"
    begun = load_file(folder / row.get("model.name", "clip") / "open_clip_model.safetensors")
    tuned = load_file(complete / "model.safetensors")
    if all(torch.equal(begun[key], tuned[key]) for key in begun):
        return "nothing was trained"
    if (
        "logit_bias" in begun
        and not row["model.random"]
        and not torch.equal(begun["logit_bias"], tuned["logit_bias"])
    ):
        return "logit_bias was trained"
    return "" if same_metrics(complete, again, row) else "other metrics"


def same_metrics(complete: Path, again: Path, row: Row) -> bool:
    """Whether both runs have the same metrics, of the steps that both ran."""
    starts_over = row.get("train.resume") == "never"
    steps = [lines(run, 1 if starts_over else 2) for run in (complete, again)]
    return steps[0] == steps[1]


def lines(folder: Path, first: int) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl from a step on, without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("images_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in clocks} for line in found if line["step"] >= first]


def run_rows(folder: Path, chunk: Sequence[tuple[str, Row]]) -> dict[str, str]:
    """The outcome of each row on one rank, up to one that raises, after which ranks may be out of step."""
    ranks = join()
    method.Part.backend = "torch"  # the kernels have tests of their own
    # With 2^16 so small a model would skip both steps and have nothing to resume.
    update.INITIAL_SCALE = 4.0
    found = {}
    for name, row in chunk:
        try:
            found[name] = run_row(folder, name, row, ranks)
        except Exception:
            found[name] = traceback.format_exc()
            break
        if ranks.is_main:
            shutil.rmtree(folder / "runs" / name)
    return found


CHUNK = 6
"""Number of rows that share processes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options")
    write_material(path)
    return path


def chunks(chosen: Sequence[Row], first: int) -> Iterator[list[tuple[str, Row]]]:
    """Rows that run in the same processes, with their names.

    Args:
        first: number of the first row.
    """
    named = [(f"{number:02d}", row) for number, row in enumerate(chosen, first)]
    for world_size in OTHER_AXES[RANKS]:
        of_size = [(name, row) for name, row in named if row[RANKS] == world_size]
        for at in range(0, len(of_size), CHUNK):
            yield of_size[at : at + CHUNK]


def outcomes_of(folder: Path, chunk: list[tuple[str, Row]]) -> dict[str, str]:
    """The outcome of each row of a chunk; where one raises, the rows after it run in new processes."""
    outcomes: dict[str, str] = {}
    while len(outcomes) < len(chunk):
        left = chunk[len(outcomes) :]
        for found in run_ranks(left[0][1][RANKS], run_rows, folder, left, init=False, timeout=500):
            outcomes.update({name: wrong for name, wrong in found.items() if wrong or name not in outcomes})
    return outcomes


def require_equal_runs(folder: Path, chosen: Sequence[Row], first: int = 0) -> None:
    wrong = {}
    for chunk in chunks(chosen, first):
        outcomes = outcomes_of(folder, chunk)
        wrong |= {name: (outcomes[name], row) for name, row in chunk if outcomes[name]}
    assert not wrong, "\n".join(
        f"{name}: {text}\n{json.dumps(row, indent=1)}" for name, (text, row) in wrong.items()
    )


def test_resumed_run_of_each_value_is_bit_equal(folder: Path) -> None:
    require_equal_runs(folder, quick_rows())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_resumed_run_of_each_pair_of_values_is_bit_equal(folder: Path) -> None:
    first = len(quick_rows())
    require_equal_runs(folder, rows()[first:], first)


# Refused combinations


def refusals(folder: Path) -> list[str]:
    """The error of each combination of :data:`INVALID`."""
    ranks, messages = join(), []
    for number, one in enumerate(INVALID):
        for row in refused_rows(one):
            tree = tree_of(folder, folder / f"refused-{number}", row)
            (folder / "refused.json").write_text(json.dumps(tree))
            try:
                train.train(load_run_config(str(folder / "refused.json")), folder / f"refused-{number}", ranks)
                messages.append(f"nothing: {row}")
            except ConfigError as error:
                messages.append(str(error))
            except Exception as error:
                messages.append(f"{type(error).__name__}, {row}\n{error}")
    return messages


def refused_rows(one: Invalid) -> list[Row]:
    """All combinations of a rule, completed so that no other rule applies."""
    found = []
    for values in itertools.product(*one.values.values()):
        row = dict(zip(one.values, values))
        # Values that other rules require.
        if row.get("evaluate.select") == "seen" and not row.keys() & NEVER.keys():
            row["evaluate.every_steps"] = 1
        if row.get("evaluate.during") is not None and not row.keys() & NEVER.keys():
            row["evaluate.every_steps"] = 1
        found.append(row)
    return found


def test_invalid_combinations_are_refused_in_one_line(folder: Path) -> None:
    (messages,) = run_ranks(1, refusals, folder, init=False)
    expected = [one.message for one in INVALID for _ in refused_rows(one)]
    assert len(messages) == len(expected)
    for line, part in zip(messages, expected, strict=True):
        assert part in line
        assert "\n" not in line


COMPILED: list[Row] = [
    {"train.schedule": "joint", "train.activation_checkpointing": "selective", STAGE: 2, RANKS: 2},
    {"train.micro_batch_size": 3, "train.activation_checkpointing": "full", STAGE: 0, RANKS: 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("row", COMPILED)
def test_compiled_run_resumes_bit_equal(row: Row, folder: Path) -> None:
    compiled = row | {"train.compile": True}
    for found in run_ranks(row[RANKS], run_rows, folder, [("compiled", compiled)], init=False, timeout=550):
        assert found == {"compiled": ""}
