"""Fine-tuning runs through the engine, as users start it: what defines one, its config, and what is measured."""

import hashlib
import json
import math
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.checkpoint.load_weights import head_of
from dive_fast.config.schema import Config, EvaluationSet
from dive_fast.distributed import Ranks
from dive_fast.engine.weight_projection import EXCLUDED, METRICS
from dive_fast.evaluation.datasets.evaluation_set import Captioned, Labelled
from dive_fast.evaluation.datasets.resolve import Opened, open_evaluation
from dive_fast.evaluation.geometry.embed import describe_pairs, embed, open_pairs
from dive_fast.evaluation.geometry.measures import rsa
from dive_fast.evaluation.weight_ensemble import State, interpolate
from dive_fast.evaluation.zero_shot import classifier_for, measure_sets, values
from dive_fast.methods.run_config import load_run_config
from dive_fast.model.head import Head, find_head, head_path
from dive_fast.model.towers import Towers, create, tokenizer_of
from dive_fast.training.loop import train
from study import model, sets
from study.methods import ADAPTERS, ENSEMBLE, IN_WEIGHT_SPACE, STUDIED, UNDECAYED, objective, projection
from study.robustness import feature_shift, sharpness, under_attack

PRETRAINED = "pretrained"
"""Method of the line of the results that is of a model before its runs."""
EVALUATED = ("validation", "id", "ood", "zs")
HELDOUT = "heldout"
"""The set on which the geometry of the embeddings is measured."""
CALIBRATION = ("ece", "ece_batched", "confidence")
"""Metrics of calibration, which a line of the results has for each set."""
NORMS = {"u": "image_norm", "v": "text_norm", "m": "average_norm"}
COURSE = 9
"""Points at most of the lengths of difference vectors over a run."""


@dataclass(frozen=True)
class Size:
    """How large a study is."""

    shape: str
    """A key of :data:`study.model.SIZES`."""
    pretraining_epochs: int
    target: int
    """Pictures of CIFAR-10."""
    batch_size: int
    epochs: dict[str, int]
    """By world; the runs of a world all have the same steps."""
    tested: int
    corruptions: int
    references: tuple[int, ...]
    """Sizes of further reference sets."""
    precision: str
    workers: int
    warmup_steps: int = 15

    def steps(self, world: str) -> int:
        """Steps of a world's runs."""
        first, last = (0, self.target) if world == "cifar10" else sets.PHOTOS["target"]
        return self.epochs[world] * ((last - first) // self.batch_size)


SIZES = {
    "small": Size("small", 12, 10_000, 64, {"cifar10": 1, "pacs": 10}, 2000, 250, (500, 2500), "fp32", 0),
    "full": Size("small", 12, 50_000, 256, {"cifar10": 1, "pacs": 60}, 5000, 1000, (500, 2500), "fp16", 4),
}
"""``small``: a run takes a minute on one core. ``full``: the same on a GPU, with all pictures."""
REFERENCE = 25_000
"""Pairs of the complete reference set, from 50 of CIFAR-100's classes."""


@dataclass(frozen=True)
class Run:
    """The settings of a run, apart from the size of its study and the pre-trained weights."""

    world: str
    method: str
    strength: float | None
    """Value of the method's :class:`study.methods.Strength`; None: the method has none."""
    learning_rate: float
    seed: int = 0
    decay: float = 0.99
    reference_batch: int | None = None
    """B'; None: B."""
    every: int = 1
    """A reference batch comes with every so many-th step."""
    reference: int = REFERENCE
    """Pairs of the reference set."""

    def is_plain(self) -> bool:
        """Whether all but method, strength, learning rate and seed is as it is by default."""
        return self == Run(self.world, self.method, self.strength, self.learning_rate, self.seed)

    def key(self, size: str, digest: str) -> dict[str, Any]:
        """As its line of the results says it."""
        return {"size": size, "model": digest} | asdict(self)


class Study:
    """Data, pre-trained models and runs of one size, in a folder; made where they are missing."""

    def __init__(self, folder: Path, size: str, ranks: Ranks) -> None:
        self.folder, self.name, self.size, self.ranks = folder, size, SIZES[size], ranks
        self.digests: dict[str, str] = {}
        self._before: dict[str, Tensor] = {}
        self._opened: Opened = {}

    def prepare(self, worlds: tuple[str, ...] = ("cifar10", "pacs")) -> None:
        """Writes the data and pre-trains."""
        size = self.size
        sets.write(
            self.data,
            size.target,
            REFERENCE,
            size.tested,
            corruptions=size.corruptions,
            references=size.references,
            worlds=worlds,
        )
        pretrained = self.folder / f"model-{size.shape}-{size.pretraining_epochs}"
        if not pretrained.exists():
            model.train(pretrained, size.shape, epochs=size.pretraining_epochs, batch_size=256, learning_rate=1e-3)
        for world in worlds:
            place = self.pretrained(world)
            if not place.exists():
                model.with_words(pretrained, place, sets.names(sets.PACS))
            self.digests[world] = model.digest(place)

    @property
    def data(self) -> Path:
        """All sets."""
        return self.folder / f"data-{self.name}"

    def pretrained(self, world: str) -> Path:
        """The model that a world's runs start from."""
        return self.folder / f"model-{self.size.shape}-{self.size.pretraining_epochs}{'-pacs' * (world == 'pacs')}"

    def key(self, run: Run) -> dict[str, Any]:
        """The fields that identify the run's line in the results."""
        return run.key(self.name, self.digests[run.world])

    def config(self, run: Run) -> Config:
        """The run's config.

        Raises:
            ConfigError: this engine has no such method or option.
        """
        size, data, pretrained = self.size, self.data, self.pretrained(run.world)
        place = data if run.world == "cifar10" else data / run.world
        evaluated = sets.evaluated(run.world)
        settings = tree(data, pretrained, place, evaluated)
        settings["objective"] = objective(
            run.method,
            run.strength,
            run.every,
            run.decay,
            Run.decay,
            width=model.WIDTH,
            steps=size.steps(run.world),
        )
        settings["projection"] = projection(run.method, run.strength)
        reference = "reference" if run.reference == REFERENCE else f"reference-{run.reference}"
        settings["data"]["target"] |= {"batch_size": size.batch_size, "workers": size.workers}
        settings["data"]["reference"] |= {
            "path": str(data / reference),
            "batch_size": run.reference_batch or size.batch_size,
            "workers": size.workers,
        }
        settings["teacher"]["path"] = str(data / f"teacher-{self.digests[run.world][:8]}-{reference}")
        settings["train"] |= {
            "epochs": size.epochs[run.world],
            "learning_rate": run.learning_rate,
            "warmup_steps": size.warmup_steps,
            "precision": size.precision,
            "seed": run.seed,
            "log_every": 5,
            "resume": "never",
        }
        if run.method in ADAPTERS:
            settings["model"]["lora"] = ADAPTERS[run.method]
        if run.method in IN_WEIGHT_SPACE:
            settings["train"]["weight_decay"] = 0.0
        # All pairs are trained on, as when the published results were measured.
        settings["evaluate"] |= {"workers": size.workers, "probe": 0}
        path = self.folder / "run.json"
        path.write_text(json.dumps(settings, indent=2) + "\n")
        return load_run_config(str(path))

    def measure(self, run: Run, keep: Path | None = None, *, attacks: bool = False) -> dict[str, Any]:
        """Trains, or interpolates, and measures; returns the run's line of the results.

        Args:
            keep: folder that the tuned weights, and a head, are left in, if any, under a hash of the run's key.
            attacks: measure robustness too.
        """
        config, begun = self.config(run), time.perf_counter()
        before = weights_of(create(config.model))
        if run.method == ENSEMBLE:
            tuned, head, measured = self._ensemble(run, config), None, dict[str, Any]()
        else:
            tuned, head, measured = self._train(run, config, keep)
        scores = self._scores(config, tuned, head)
        seconds = time.perf_counter() - begun
        after = self._embed(config, tuned)
        return (
            self.key(run)
            | scores
            | {"rsa": rsa(self._pretrained_embeddings(run.world, config), after)}
            | measured
            | distance(before, weights_of(tuned))
            | {"seconds": round(seconds, 1)}
            | (self._robustness(run, config, tuned, head, after) if attacks else {})
        )

    def _train(self, run: Run, config: Config, keep: Path | None) -> tuple[Towers, Head | None, dict[str, Any]]:
        """The tuned towers, their head if they have one, and fields of the results from the run's metrics."""
        place = self.folder / "run"
        shutil.rmtree(place, ignore_errors=True)
        # All metrics of the sets are measured below, in one pass.
        without_sets = config.evaluate.model_copy(update={"sets": {}})
        metrics = train(config.model_copy(update={"evaluate": without_sets}), place, self.ranks)
        tuned = create(config.model).load_exported(load_file(place / "model.safetensors")).eval()
        head = head_of(place / "model.safetensors")
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            kept = keep / f"{named(self.key(run))}.safetensors"
            if (file := find_head(place / "model.safetensors")) is not None:
                file.replace(head_path(kept))
            (place / "model.safetensors").replace(kept)
        shutil.rmtree(place)
        measured = {symbol: metrics[name] for symbol, name in NORMS.items() if name in metrics}
        return tuned, head, measured | {"course": course(lines)} | projected(lines) | perturbed(lines)

    def _ensemble(self, run: Run, config: Config) -> Towers:
        """Weights between the pre-trained ones and those of ``UNDECAYED``, which is trained if it is missing."""
        tuned, folder = replace(run, method=UNDECAYED, strength=None), self.folder / "weights"
        path = folder / f"{named(self.key(tuned))}.safetensors"
        if not path.exists():
            self.measure(tuned, folder)
        assert run.strength is not None
        towers = create(config.model)
        return towers.load_exported(interpolate(weights_of(towers), load_file(path), 1 - run.strength)).eval()

    def pretrained_row(self, run: Run, *, attacks: bool = False) -> dict[str, Any]:
        """The line of the model that all runs of a world start from: no run, so no method either.

        Args:
            attacks: as of :meth:`measure`.
        """
        config, towers = self.config(run), create(self.config(run).model).eval()
        row = self.key(run) | {"method": PRETRAINED} | self._scores(config, towers) | {"rsa": 1.0}
        if attacks:
            row |= self._robustness(run, config, towers, None, self._pretrained_embeddings(run.world, config))
        return row

    def _robustness(
        self, run: Run, config: Config, towers: Towers, head: Head | None, after: Tensor
    ) -> dict[str, Any]:
        """Fields of the results about attacks, the shift of image features and sharpness.

        Args:
            after: as of :meth:`_embed`.
        """
        begun, tokenizer = time.perf_counter(), tokenizer_of(config.model)
        data = self._open(config.evaluate.sets["id"])
        target = self._open(EvaluationSet.model_validate(labelled(self.data, "target")))
        assert isinstance(data, Labelled)
        assert isinstance(target, Labelled)
        towers = towers.to(self.ranks.device)
        classes = classifier_for(towers, tokenizer, data, self.ranks, head)
        before = self._pretrained_embeddings(run.world, config)
        eigenvalue = sharpness(towers, classes, target)
        return {
            "attacked": under_attack(towers, classes, data, self.ranks),
            "shift": feature_shift(before[: len(before) // 2], after[: len(after) // 2]),
            "sharpness": eigenvalue.value,
            "sharpness_error": eigenvalue.error,
            "attack_seconds": round(time.perf_counter() - begun, 1),
        }

    def _open(self, section: EvaluationSet) -> Labelled | Captioned:
        if section.path not in self._opened:
            self._opened[section.path] = open_evaluation(section)
        return self._opened[section.path]

    def _scores(self, config: Config, towers: Towers, head: Head | None = None) -> dict[str, Any]:
        """Accuracy on each set by its name, and each of :data:`CALIBRATION` on all sets."""
        sections, tokenizer = config.evaluate.sets, tokenizer_of(config.model)
        opened = {name: self._open(section) for name, section in sections.items()}
        towers = towers.to(self.ranks.device)
        measured = measure_sets(towers, tokenizer, config.evaluate, opened, self.ranks, head)
        return values(measured, sections) | {
            metric: {name: result.scores[metric] for name, result in measured.items()} for metric in CALIBRATION
        }

    def _pretrained_embeddings(self, world: str, config: Config) -> Tensor:
        if world not in self._before:
            self._before[world] = self._embed(config, create(config.model).eval())
        return self._before[world]

    def _embed(self, config: Config, towers: Towers) -> Tensor:
        """``(2 N, D)`` unit rows: images, then captions, of pairs that no run trains on."""
        described = describe_pairs(None, str(self.data / HELDOUT), "webdataset")
        towers = towers.to(self.ranks.device)
        return torch.cat(embed(towers, open_pairs(config.model, described, towers), self.ranks, 256))


def named(key: dict[str, Any]) -> str:
    """A file name for what a run left: its world, its method and a hash of the rest."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return f"{key['world']}-{key['method']}-{key['seed']}-{digest}"


def weights_of(towers: Towers) -> State:
    """A copy of all weights, under open_clip's names, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in towers.export(towers.state_dict()).items()}


def distance(before: State, after: State) -> dict[str, float]:
    """``|W - W0|``, and relative to ``|W0|``, over the tensors that take part in a projection."""
    names = [name for name in before if name.rpartition(".")[2] not in EXCLUDED]
    moved, length = (
        math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
        for tensors in ((after[name] - before[name] for name in names), (before[name] for name in names))
    )
    return {"distance": moved, "relative_distance": moved / length}


def projected(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the lines of ``metrics.jsonl`` of a projection's strength, and of the tensors that it changes."""
    values: dict[str, list[float]] = {}
    for name, value in (item for line in lines for item in line.items()):
        if name.startswith(METRICS) and "distance" not in name and value is not None:
            values.setdefault(name.removeprefix(METRICS), []).append(value)
    return {"projection": {name: statistics.fmean(each) for name, each in values.items()}} if values else {}


PERTURBED = ("cross_entropy", "perturbed_loss", "perturbation_gain", "gram_volume")
"""Metrics of a method that perturbs weights."""


def perturbed(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the lines of ``metrics.jsonl`` of :data:`PERTURBED`, where a method perturbs weights."""
    known = [line for line in lines if line.get(PERTURBED[-1]) is not None]
    means = {name: statistics.fmean(line[name] for line in known) for name in PERTURBED if known}
    return {"perturbed": means} if means else {}


def course(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Lengths of the difference vectors along a run: some lines of ``metrics.jsonl``, first and last included."""
    lines = [line for line in lines if any(name in line for name in NORMS.values())]
    if not lines:
        return []
    places = sorted({round(i * (len(lines) - 1) / (COURSE - 1)) for i in range(COURSE)})
    found = []
    for place in places:
        line = lines[place]
        norms = {symbol: line[name] for symbol, name in NORMS.items() if line.get(name) is not None}
        found.append({"step": line["step"]} | {symbol: float(f"{value:.4g}") for symbol, value in norms.items()})
    return found


def prepare(folder: Path, size: str = "small", epochs: int = 12, **counts: int) -> Path:
    """Data, pre-trained model and config below ``folder``, made where they are missing; returns the config's path.

    Args:
        epochs: of pre-training.
        counts: as :func:`study.sets.write` takes them.
    """
    data = sets.write(folder / "data", **counts)
    pretrained = folder / f"model-{size}-{epochs}"
    if not pretrained.exists():
        model.train(pretrained, size, epochs=epochs, batch_size=256, learning_rate=1e-3)
    path = folder / "cifar10.json"
    path.write_text(json.dumps(tree(data, pretrained), indent=2) + "\n")
    return path


def labelled(folder: Path, name: str) -> dict[str, str]:
    """The config section of a labelled set."""
    place = folder / name
    names = {"class_names": f"{place}/classes.txt", "templates": f"{place}/templates.txt"}
    return {"format": "webdataset", "path": str(place), **names}


def tree(
    data: Path,
    pretrained: Path,
    labelled_sets: Path | None = None,
    evaluated: tuple[str, ...] | list[str] = EVALUATED,
) -> dict[str, Any]:
    """A DiVE config; learning rate and lambda are to be chosen.

    Args:
        labelled_sets: folder of the world's labelled sets; default: ``data``.
        evaluated: names of those that the tuned model is measured on.
    """
    return {
        "model": {"name": f"local-dir:{pretrained}"},
        "data": {
            "target": labelled(labelled_sets or data, "target") | {"batch_size": 128, "workers": 1},
            "reference": {
                "format": "webdataset",
                "path": str(data / "reference"),
                "batch_size": 128,
                "workers": 1,
            },
        },
        "objective": {"name": STUDIED},
        "teacher": {"mode": "cache", "path": f"{pretrained}-teacher"},
        "train": {
            "epochs": 2,
            "learning_rate": 3e-4,
            "weight_decay": 0.1,
            "warmup_steps": 15,
            "precision": "fp32",
        },
        "evaluate": {"sets": {name: labelled(labelled_sets or data, name) for name in evaluated}, "workers": 0},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
