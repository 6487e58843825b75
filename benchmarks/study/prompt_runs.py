"""Learned prompts after an update of the model: which runs there are, how they are made, and what is measured.

The *old* model has read three quarters of CIFAR-100's classes, for half as many epochs as the *new* one, which has
read all. Both have one shape, one tokenizer and one random start. Classes by their label modulo 4:

====================  ==============================================================  ==========
part                  use                                                             read by
====================  ==============================================================  ==========
0                     the target ``fine``: 16 pictures of each class are trained on   both
1                     classes that no prompt was trained on                           both
2                     captioned, the reference set of the full fine-tuning            both
3                     classes that no prompt was trained on                           the new one
====================  ==============================================================  ==========

The target ``coarse`` has the pictures of all classes under the names of their superclasses, which both have read.
Pictures are those of the test split, on which no model was pre-trained; captioned ones are of the train split. The
target ``unread`` is CIFAR-10, of whose names both have read *truck* alone.

Learning rates are chosen on validation pictures of the target by the old model, at seed 0, from one grid for all
prompt learners, and serve both models.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dive_fast.config.schema import Config, EvaluationSet
from dive_fast.data.loaders.loader import Options as LoaderOptions
from dive_fast.data.loaders.loader import batches_of
from dive_fast.data.samples import EvaluationSamples
from dive_fast.distributed import Ranks
from dive_fast.evaluation.classifier import Classifier
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.resolve import open_evaluation
from dive_fast.evaluation.zero_shot import classifier_for
from dive_fast.methods.run_config import load_run_config
from dive_fast.model import prompt_file
from dive_fast.model.towers import Towers, create, tokenizer_of, unit
from dive_fast.training.loop import train
from study import model, results, sets

OLD, NEW = "old", "new"
FINE, COARSE, UNREAD = "fine", "coarse", "unread"
ZERO_SHOT = "zero-shot"
"""Method of a measurement without prompts."""
LEARNERS = ("coop", "kgcoop", "contcoop")
ATTENDING, WITHOUT_RESIDUAL = "contcoop", "contcoop_attention"
"""ContCoOp whose context is the attention alone, at one seed and ContCoOp's learning rate."""
TUNED = "dive"
"""Fine-tuning of all weights, for comparison: its result cannot be plugged into another model."""
SEEDS = (0, 1, 2)
PARTS = 4
"""Classes are dealt by their label modulo this number."""
TARGET, UNSEEN, CAPTIONED, UPDATE = range(PARTS)
SHOTS = 16
PER_CLASS = {"target": (0, 32), "validation": (32, 48), "id": (48, 100)}
"""Ranges of the test split's pictures of a class, which come in turns."""


class Settings(NamedTuple):
    """The settings of runs of one kind, as sections of a config."""

    learning_rates: tuple[float, ...]
    epochs: int
    target: dict[str, Any]
    optimizer: dict[str, Any]


PROMPTS = Settings(
    (0.002, 0.02, 0.2, 2.0),
    25,
    {"batch_size": 32, "crop_scale": [0.5, 1.0], "horizontal_flip": 0.5},
    {
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup_rate": 1e-5,
        "cosine_every": "epoch",
    },
)
"""As CoOp's code, but for half of its epochs, for learning rates around its 0.002 and for smaller crops."""
TUNING = Settings((3e-4, 1e-3), 10, {"batch_size": 64, "horizontal_flip": 0.5}, {"weight_decay": 0.1})
TUNING_STRENGTH = 1.0
"""Weight of the reference loss, that of the study."""
REFERENCE = 2500
"""Captioned pairs."""
CONTEXTS = {FINE: "a photo of a", COARSE: "a photo of some", UNREAD: "a photo of a"}
"""Starts of the context."""
TEMPLATES = {FINE: sets.TEMPLATES, COARSE: sets.COARSE_TEMPLATES, UNREAD: sets.TEMPLATES}
EVALUATED = {
    FINE: ("validation", "id", "unseen", "update"),
    COARSE: ("validation", "id"),
    UNREAD: ("validation", "id"),
}
"""Sets of each target: ``id`` has the target's classes, ``unseen`` and ``update`` those of parts 1 and 3."""
PRETRAINING = {OLD: (6, tuple(label for label in range(100) if label % PARTS != UPDATE)), NEW: (12, range(100))}
"""Epochs and classes of each model."""
FOLDERS = {OLD: "6-classes-75", NEW: "12"}
"""Endings of the models' folders."""


@dataclass(frozen=True)
class PromptRun:
    """A training with one model and the model that its result is measured on."""

    target: str
    method: str
    trained: str
    """``old`` or ``new``; for zero-shot the measured model."""
    measured: str
    learning_rate: float | None = None
    seed: int = 0

    def key(self, size: str, digests: Mapping[str, str]) -> dict[str, Any]:
        """The fields that identify its line of the results."""
        models = {"trained_weights": digests[self.trained], "measured_weights": digests[self.measured]}
        return {"size": size} | asdict(self) | models


KEY = ("size", *PromptRun.__dataclass_fields__, "trained_weights", "measured_weights")
"""Fields that identify a line of the results."""
Row = results.Row


def accuracy(row: Row, name: str) -> float:
    """The accuracy of a line of the results on one of its sets."""
    return float(row["accuracy"][name])


def plan(rows: Sequence[Row], targets: Sequence[str] = (FINE, COARSE, UNREAD)) -> list[PromptRun]:
    """All runs that can be named with the results so far, the most telling first: gains before shares.

    Fine-tuning is compared on the first target.

    Args:
        rows: of one old model.
    """
    with_old, with_new, retrained, ablations = (list[PromptRun]() for _ in range(4))
    for target in targets:
        with_old.append(PromptRun(target, ZERO_SHOT, OLD, OLD))
        with_new.append(PromptRun(target, ZERO_SHOT, NEW, NEW))
        for method in LEARNERS:
            with_old += trials(target, method)
            if (chosen := choice(rows, target, method)) is None:
                continue
            with_old += [replace(chosen, seed=seed) for seed in SEEDS]
            with_new += [replace(chosen, measured=NEW, seed=seed) for seed in SEEDS]
            retrained += [replace(chosen, trained=NEW, measured=NEW, seed=seed) for seed in SEEDS]
            if method == ATTENDING:
                changed = replace(chosen, method=WITHOUT_RESIDUAL)
                ablations += [changed, replace(changed, measured=NEW), replace(changed, trained=NEW, measured=NEW)]
    with_new += [run for run in retrained if run.seed == SEEDS[0]] + trials(targets[0], TUNED)
    if (chosen := choice(rows, targets[0], TUNED)) is not None:
        retrained += [replace(chosen, seed=seed) for seed in SEEDS]
        retrained += [replace(chosen, trained=NEW, measured=NEW, seed=seed) for seed in SEEDS]
        with_new.append(replace(chosen, trained=NEW, measured=NEW))
    retrained.sort(key=lambda run: run.seed)
    return list(dict.fromkeys(with_old + with_new + ablations + retrained))


def settings_of(method: str) -> Settings:
    """The settings of a method's runs."""
    return TUNING if method == TUNED else PROMPTS


def trials(target: str, method: str) -> list[PromptRun]:
    """The runs among which a method's learning rate is chosen."""
    return [PromptRun(target, method, OLD, OLD, rate) for rate in settings_of(method).learning_rates]


def choice(rows: Sequence[Row], target: str, method: str) -> PromptRun | None:
    """The trial with the highest validation accuracy, at equal ones the smaller rate; None until all ended.

    Args:
        rows: of one old model.
    """
    scores = {run_of(row): accuracy(row, "validation") for row in rows}
    tried = trials(target, method)
    return max(tried, key=lambda run: scores[run]) if all(run in scores for run in tried) else None


def run_of(row: Row) -> PromptRun:
    """The run that a line of the results is of."""
    return PromptRun(**{field: row[field] for field in PromptRun.__dataclass_fields__})


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last line of each run."""
    return list({json.dumps([row.get(name) for name in KEY]): row for row in rows}.values())


class PromptStudy:
    """Data, models and runs, in a folder; created where they are missing."""

    def __init__(self, folder: Path, size: str, shape: str, ranks: Ranks) -> None:
        """Writes the data; models are pre-trained when a run needs them.

        Args:
            folder: that of the study, in which the new model is the study's.
            shape: key of :data:`study.model.SIZES`.
        """
        self.name, self.shape, self.ranks = size, shape, ranks
        self.folder, self.data = folder / f"prompts-{size}", folder / f"prompts-{size}" / "data"
        self.models = {name: folder / f"model-{shape}-{ending}" for name, ending in FOLDERS.items()}
        self.digests = {name: model.digest(path) for name, path in self.models.items() if path.exists()}
        self._images: dict[tuple[str, str, str], tuple[Tensor, Tensor]] = {}
        write(self.data)

    def prepare(self, run: PromptRun) -> None:
        """Pre-trains the models of a run, unless they are there."""
        for name in {run.trained, run.measured} - self.digests.keys():
            epochs, classes = PRETRAINING[name]
            if not self.models[name].exists():
                model.train(
                    self.models[name],
                    self.shape,
                    epochs=epochs,
                    batch_size=256,
                    learning_rate=1e-3,
                    classes=classes,
                )
            self.digests[name] = model.digest(self.models[name])

    def key(self, run: PromptRun) -> dict[str, Any]:
        """The fields that identify the run's line of the results."""
        return run.key(self.name, self.digests)

    def results(self, rows: Iterable[Row]) -> dict[PromptRun, Row]:
        """The lines of the results that are of these models."""
        return {
            run_of(row): row
            for row in rows
            if all(row[f"{part}_weights"] == self.digests.get(row[part]) for part in ("trained", "measured"))
        }

    def work(self, path: Path, minutes: float | None = None, begun: float = 0.0, *, dry: bool = False) -> None:
        """Works off the plan.

        Args:
            path: of the results.
            begun: when the minutes began, by ``time.perf_counter``.
            dry: only say what is left.
        """
        while minutes is None or time.perf_counter() - begun < 60 * minutes:
            known = self.results(latest(results.read(path)))
            left = [run for run in plan(list(known.values())) if run not in known]
            if dry:
                print("\n".join(map(str, left)), f"{len(left)} runs left", sep="\n")
            if dry or not left:
                return
            self.prepare(left[0])
            row = self.measure(left[0])
            results.append(path, row)
            print(f"{len(left) - 1} left: {row}", flush=True)

    def measure(self, run: PromptRun) -> Row:
        """The run's line of the results; a training whose result was kept is not repeated."""
        config = self.config(run)
        measured = config.model.model_copy(update={"name": f"local-dir:{self.models[run.measured]}"})
        towers, tokenizer, fields = create(measured).eval(), tokenizer_of(measured), dict[str, Any]()
        if run.method != ZERO_SHOT:
            trained = self._trained(run, config)
            fields = json.loads((trained / "run.json").read_text())
            if run.method == TUNED:
                towers = create(measured.model_copy(update={"name": f"local-dir:{trained}"})).eval()
            else:
                path = trained / prompt_file.FILE
                prompt_file.attach(prompt_file.load(path), path, towers, tokenizer)
        towers = towers.to(self.ranks.device)
        values = {}
        for name in EVALUATED[run.target]:
            data = self._open(run.target, name)
            classes = classifier_for(towers, tokenizer, data, self.ranks)
            pictures = run.measured if run.method != TUNED else None
            values[name] = self._accuracy(towers, classes, data, (pictures, run.target, name))
        return self.key(run) | {"accuracy": values} | fields

    def _accuracy(
        self, towers: Towers, classes: Classifier, data: Labelled, where: tuple[str | None, str, str]
    ) -> float:
        """Accuracy on a set. Prompts leave image features as they are, which are computed once for each model."""
        name, *rest = where
        if name is None:
            features, labels = embed_images(towers, data)
        else:
            key = (name, *rest)
            if key not in self._images:
                self._images[key] = embed_images(towers, data)
            features, labels = self._images[key]
        return float((classes.logits(features).argmax(1) == labels).double().mean())

    def _trained(self, run: PromptRun, config: Config) -> Path:
        """The folder of what a run was trained to."""
        key = {name: value for name, value in self.key(run).items() if not name.startswith("measured")}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
        kept = self.folder / "trained" / f"{run.target}-{run.method}-{run.trained}-{run.seed}-{digest}"
        if kept.exists():
            return kept
        place, begun = self.folder / "run", time.process_time()
        shutil.rmtree(place, ignore_errors=True)
        metrics = train(config, place, self.ranks)
        fields = {"cpu_seconds": round(time.process_time() - begun, 1)}
        fields |= {name: metrics[name] for name in ("loss", "cross_entropy", "prompt_distance") if name in metrics}
        (place / "run.json").write_text(json.dumps(fields))
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        place.replace(kept)
        return kept

    def _open(self, target: str, name: str) -> Labelled:
        section = described(self.data, target, name)
        data = open_evaluation(EvaluationSet.model_validate(section))
        assert isinstance(data, Labelled)
        return data

    def config(self, run: PromptRun) -> Config:
        """The run's config."""
        settings, is_tuned = settings_of(run.method), run.method == TUNED
        classes = len((self.data / run.target / "target" / "classes.txt").read_text().splitlines())
        steps_per_epoch = SHOTS * classes // settings.target["batch_size"]
        shots = {"shots": SHOTS, "shots_seed": run.seed + 1, "workers": 0}
        data = {"target": described(self.data, run.target, "target") | shots | settings.target}
        name = "contcoop" if run.method == WITHOUT_RESIDUAL else run.method
        objective: dict[str, Any] = {"name": name, "context": CONTEXTS[run.target]}
        if run.method == WITHOUT_RESIDUAL:
            objective["residual"] = False
        teacher = {}
        if is_tuned:
            objective = {"name": TUNED, "weight": TUNING_STRENGTH}
            reference = {"format": "webdataset", "path": str(self.data / "reference"), "workers": 0}
            data["reference"] = reference | {"batch_size": settings.target["batch_size"]}
            teacher = {"teacher": {"path": str(self.folder / f"teacher-{self.digests[run.trained][:8]}")}}
        elif run.method == ZERO_SHOT:
            objective = {"name": LEARNERS[0]}
        tree = {
            "model": {"name": f"local-dir:{self.models[run.trained]}"},
            "data": data,
            "objective": objective,
            **teacher,
            "train": {
                "epochs": settings.epochs,
                "learning_rate": run.learning_rate or settings.learning_rates[0],
                "warmup_steps": steps_per_epoch,
                "precision": "fp32",
                "seed": run.seed,
                "resume": "never",
                **settings.optimizer,
            },
            "evaluate": {"workers": 0, "probe": 0},
            "deepspeed": {"zero_optimization": {"stage": 0}},
        }
        path = self.folder / "run.json"
        path.write_text(json.dumps(tree, indent=2) + "\n")
        return load_run_config(str(path))


@torch.no_grad()
def embed_images(towers: Towers, data: Labelled) -> tuple[Tensor, Tensor]:
    """Unit image features ``(N, D)`` in the evaluation view, and labels ``(N,)``."""
    samples = EvaluationSamples(data.source, towers.preprocess)
    device, keys = towers.logit_scale.device, [(0, row) for row in range(len(data.source))]
    features, labels = list[Tensor](), list[Tensor]()
    for batch in batches_of(samples, keys, 256, LoaderOptions(device=device)):
        batch = batch.to(device)
        features.append(unit(towers.encode_image(batch.images)))
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


def described(data: Path, target: str, name: str) -> dict[str, str]:
    """The config section of a labelled set."""
    place = data / target / name
    names = {"class_names": f"{place}/classes.txt", "templates": f"{place}/templates.txt"}
    return {"format": "webdataset", "path": str(place), **names}


def labelled_sets() -> dict[str, dict[str, sets.Pictures]]:
    """Every labelled set, by target and name."""
    pictures = sets.load(sets.CIFAR100, "test")
    names = sets.names(sets.CIFAR100, "coarse")
    superclasses = np.array([names.index(name) for name in sets.superclasses(sets.CIFAR100, "test")])
    # The first k pictures of each class come before the others.
    turns = np.empty(len(pictures.labels), dtype=np.int64)
    for label in range(len(pictures.names)):
        rows = np.flatnonzero(pictures.labels == label)
        turns[rows] = np.arange(len(rows))
    fine, coarse = dict[str, sets.Pictures](), dict[str, sets.Pictures]()
    for name, (first, last) in PER_CLASS.items():
        rows = np.flatnonzero((turns >= first) & (turns < last))
        part = pictures._replace(images=pictures.images[rows], labels=pictures.labels[rows])
        fine[name] = sets.of_classes(part, _labels(TARGET))
        coarse[name] = sets.Pictures(part.images, superclasses[rows], names)
        if name == "id":
            fine |= {"unseen": sets.of_classes(part, _labels(UNSEEN))}
            fine |= {"update": sets.of_classes(part, _labels(UPDATE))}
    tested = sets.load(sets.CIFAR10, "test")
    unread = {
        "target": sets.cut(sets.load(sets.CIFAR10, "train"), 0, 1000),
        "validation": sets.cut(tested, 0, 1000),
        "id": sets.cut(tested, 5000, 8000),
    }
    return {FINE: fine, COARSE: coarse, UNREAD: unread}


def _labels(part: int) -> list[int]:
    return [label for label in range(100) if label % PARTS == part]


def write(folder: Path) -> None:
    """Writes every set as webdataset tars, unless they are there."""
    mark = folder / "complete"
    if mark.exists():
        return
    for target, named in labelled_sets().items():
        for name, pictures in named.items():
            sets.write_labelled(folder / target / name, pictures, TEMPLATES[target])
    captioned = sets.load(sets.CIFAR100, "train")
    rows = np.flatnonzero(np.isin(captioned.labels, _labels(CAPTIONED)))
    sets.write_captioned(folder / "reference", captioned, "train", rows[:REFERENCE])
    mark.touch()
