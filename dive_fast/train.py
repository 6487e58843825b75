"""The loop: batches in, steps, metrics, checkpoints, and at the end a model that open_clip loads."""

import json
import logging
import platform
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dive_fast import checkpoint, objective
from dive_fast.config import Config, ConfigError
from dive_fast.data.ahead import Ahead
from dive_fast.data.batch import ReferenceBatch, TargetBatch
from dive_fast.data.loader import training_batches
from dive_fast.data.order import Order
from dive_fast.data.prompts import PromptTable, read_class_names, read_templates
from dive_fast.data.samples import ReferenceSamples, TargetSamples
from dive_fast.data.sets import open_reference, open_target
from dive_fast.engine import AUTOCAST, Engine, StepBatches
from dive_fast.evaluate.zero_shot import evaluate, open_set
from dive_fast.ranks import Ranks
from dive_fast.teacher.audit import allowed
from dive_fast.teacher.build import loader_options, open_teacher, reference_samples
from dive_fast.teacher.teachers import Teacher
from dive_fast.towers import Towers, create, tokenizer_of

logger = logging.getLogger(__name__)

NOISE_FLOOR = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
"""Largest mean |u| and |v| allowed before the first update, where the tuned model is the frozen one and only the
rounding of the forward pass is left (measured: 1.2e-3 in fp16, 9.1e-3 in bf16): more means a wrong cache."""

DIFFERENCE_VECTORS = {"image_norm": "|u|", "text_norm": "|v|"}
DROWNED = 1 / 3
"""Share of rounding in a difference vector, above which its gradient is no longer that of fp32: at a third the
cosine is 0.97 in fp16 (docs/precision.md)."""


@dataclass(frozen=True)
class Run:
    """All that the loop needs, built from a config."""

    config: Config
    folder: Path
    ranks: Ranks
    engine: Engine
    target: TargetSamples
    target_order: Order
    reference: ReferenceSamples | None
    reference_order: Order | None
    teacher: Teacher | None
    total_steps: int


def train(config: Config, folder: Path, ranks: Ranks) -> dict[str, float]:
    """Runs a config from its newest checkpoint, or its start, to its end; returns the final metrics.

    Leaves ``metrics.jsonl``, ``config.json``, ``checkpoints/`` and ``model.safetensors`` in ``folder``.

    Raises:
        ConfigError, DataError: the user's to mend; the message says how.
    """
    run = build(config, folder, ranks)
    engine, options = run.engine, config.train
    found = checkpoint.find(options.resume, folder / "checkpoints")
    first_step = checkpoint.load(engine, found) if found is not None else 0
    steps = range(first_step, run.total_steps)
    ahead = _batches(run, steps)
    metrics = Metrics(run, first_step, ahead)
    with closing(ahead):
        for step, batches in zip(steps, ahead, strict=True):
            if batches.reference is not None and batches.teacher is None and run.teacher is not None:
                batches.teacher = run.teacher(batches.reference)
            learning_rate = engine.learning_rate
            values = engine.step(batches)
            if step == 0:
                _check_noise_floor(values, config)
            metrics.log(step + 1, values, learning_rate)
            is_last = step + 1 == run.total_steps
            if options.checkpoint_every and (step + 1) % options.checkpoint_every == 0 and not is_last:
                checkpoint.save(engine, folder / "checkpoints", step + 1, options.keep_checkpoints)
    if len(steps) > 0:
        checkpoint.save(engine, folder / "checkpoints", run.total_steps, options.keep_checkpoints)
    exported = folder / "model.safetensors"
    checkpoint.export(engine, exported)
    accuracies = evaluate(_tuned(config, exported, ranks), tokenizer_of(config.model), config.evaluate, ranks)
    return metrics.close({f"accuracy/{name}": value for name, value in accuracies.items()})


def build(config: Config, folder: Path, ranks: Ranks) -> Run:
    """Opens the data, builds the models and the teacher, and hands the student to DeepSpeed.

    Raises:
        ConfigError, DataError: the user's to mend; the message says how.
    """
    seed = config.train.seed
    # Before any model is built: a typo in a path should not cost minutes.
    source = open_target(config.data.target)
    reference = None if config.data.reference is None else open_reference(config.data.reference)
    if ranks.first:
        source.report_skipped("data.target")
        if reference is not None:
            reference.report_skipped("data.reference")
    for evaluation in config.evaluate.sets.values():
        open_set(evaluation)
    torch.manual_seed(seed)
    towers = create(config.model)
    check_text_length(config, towers)

    data = config.data.target
    names = source.class_names if data.class_names is None else read_class_names(data.class_names)
    prompts = PromptTable(
        source, names, read_templates(data.templates), tokenizer_of(config.model, data.text_length)
    )
    target_samples = TargetSamples(source, prompts, towers.preprocess, towers.pooled_at, seed)
    target_order = Order(len(source), data.batch_size, ranks.rank, ranks.world_size, seed)
    total_steps = target_order.steps_per_epoch * config.train.epochs
    total_steps = min(total_steps, config.train.max_steps or total_steps)

    goal = objective.create(config.objective, towers.width)
    pairs = reference_order = teacher = None
    if goal.needs_reference:
        assert reference is not None and config.data.reference is not None
        pairs = reference_samples(config, reference, towers)
        # Another stream than the target's, or both sets would be shuffled alike.
        reference_order = Order(
            len(reference), config.data.reference.batch_size, ranks.rank, ranks.world_size, seed + 1
        )
        teacher = open_teacher(config, folder, towers, pairs, ranks)
        if config.train.precision == "bf16" and ranks.first:
            logger.warning(
                "train.precision = bf16 drowns difference vectors of 1e-3 in rounding: at |u| = 3e-3 the gradient "
                "of AVL + PVL has cosine 0.45 to that of fp32, in fp16 0.97 (docs/precision.md); prefer fp16"
            )
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        _write_provenance(config, folder, ranks)
    engine = Engine(config, towers, goal, ranks, total_steps)
    return Run(
        config,
        folder,
        ranks,
        engine,
        target_samples,
        target_order,
        pairs,
        reference_order,
        teacher,
        total_steps,
    )


class Metrics:
    """Progress bar, metrics.jsonl and DeepSpeed's monitor on the first rank; reads the device only to log."""

    def __init__(self, run: Run, first_step: int, batches: "Batches") -> None:
        self._run, self._batches = run, batches
        self._enabled = run.ranks.first
        self._last: dict[str, float] = {}
        self._since, self._since_step, self._since_waited = time.perf_counter(), first_step, 0.0
        self._floor: dict[str, float] = {}
        if self._enabled:
            self._path = run.folder / "metrics.jsonl"
            kept = [line for line in self._lines() if json.loads(line)["step"] <= first_step]
            self._path.write_text("".join(f"{line}\n" for line in kept))
            self._floor = json.loads(kept[0]) if kept else {}
        self._bar = run.ranks.progress(run.total_steps, "train", "step", done=first_step)

    def log(self, step: int, values: dict[str, torch.Tensor], learning_rate: float) -> None:
        """Takes the metrics of one step; every ``train.log_every`` steps they are read and written."""
        self._bar.update()
        engine = self._run.engine
        if step % self._run.config.train.log_every and step not in (1, self._run.total_steps):
            return
        self._last = {name: float(value) for name, value in values.items()}
        if not self._enabled:
            return
        now = time.perf_counter()
        images = (step - self._since_step) * self._images_per_step()
        self._last |= {
            "learning_rate": learning_rate,
            "images_per_second": images / (now - self._since),
            # Of the loop's time, on this rank, what it spent waiting for a batch: 0 where the loaders keep up.
            "data_wait": (self._batches.waited - self._since_waited) / (now - self._since),
            "epoch": step / self._run.target_order.steps_per_epoch,
            "skipped_steps": engine.skipped_steps,
        }
        if engine.scale.dynamic:
            self._last["loss_scale"] = engine.scale.value
        self._since, self._since_step, self._since_waited = now, step, self._batches.waited
        shown = {
            "loss": "loss",
            "u": "image_norm",
            "v": "text_norm",
            "img/s": "images_per_second",
            "wait": "data_wait",
        }
        values_shown = {short: f"{self._last[name]:.3g}" for short, name in shown.items() if name in self._last}
        self._bar.set_postfix(values_shown, refresh=False)
        self._write(step, self._last)
        if step == 1:
            self._floor = self._last
        elif step > self._run.config.train.warmup_steps:
            self._warn_of_noise()

    def close(self, results: dict[str, float]) -> dict[str, float]:
        """Writes results of the whole run; returns them with the last step's metrics."""
        self._bar.close()
        if self._enabled and results:
            self._write(self._run.total_steps, results)
        return self._last | results

    def _warn_of_noise(self) -> None:
        """Once: says so if rounding, which is all there was before the first update, drowns difference vectors."""
        floor, self._floor = self._floor, {}
        for name, symbol in DIFFERENCE_VECTORS.items():
            if name in floor and floor[name] > DROWNED * self._last[name]:
                logger.warning(
                    "mean %s is %.1e after the warm-up, of which rounding in %s alone makes %.1e: above a third "
                    "the gradient of AVL + PVL points elsewhere than in fp32 (docs/precision.md); fp16 rounds an "
                    "eighth of what bf16 does, fp32 next to nothing",
                    symbol,
                    self._last[name],
                    self._run.config.train.precision,
                    floor[name],
                )

    def _write(self, step: int, values: dict[str, float]) -> None:
        with self._path.open("a") as lines:
            lines.write(json.dumps({"step": step} | values) + "\n")
        monitor = self._run.engine.deepspeed.monitor
        if monitor.enabled:
            pairs = step * self._run.config.data.target.batch_size
            monitor.write_events([(f"train/{name}", value, pairs) for name, value in values.items()])

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []

    def _images_per_step(self) -> int:
        data = self._run.config.data
        reference = (
            data.reference.batch_size if data.reference is not None and self._run.reference is not None else 0
        )
        return data.target.batch_size + reference


Loaded = tuple[TargetBatch, ReferenceBatch | None]
Batches = Ahead[Loaded, StepBatches]


def _batches(run: Run, steps: range) -> Batches:
    """The batches of the given steps on this rank's device, with the rows of a teacher who only looks them up."""
    data, device = run.config.data, run.ranks.device
    targets = training_batches(
        run.target, run.target_order, steps, loader_options(run.config, data.target, run.ranks)
    )
    loaded: zip[Loaded] = zip(targets, repeat(None), strict=False)
    if run.reference is not None and run.reference_order is not None and data.reference is not None:
        options = loader_options(run.config, data.reference, run.ranks)
        loaded = zip(targets, training_batches(run.reference, run.reference_order, steps, options), strict=True)

    def ready(batches: Loaded) -> StepBatches:
        target, reference = batches
        if reference is None:
            return StepBatches(target.to(device))
        reference = reference.to(device)
        rows = run.teacher(reference) if run.teacher is not None and run.teacher.runs_ahead else None
        return StepBatches(target.to(device), reference, rows)

    return Ahead(loaded, ready, device)


def _tuned(config: Config, exported: Path, ranks: Ranks) -> Towers:
    """The exported model, whole on every rank: under ZeRO-3 the student's own towers run only inside DeepSpeed."""
    tuned = create(config.model).load_exported(load_file(exported)).to(ranks.device).eval()
    tuned.autocast = AUTOCAST[config.train.precision]
    return tuned


def check_text_length(config: Config, towers: Towers) -> None:
    """Holds ``text_length`` to what the text tower can take.

    Raises:
        ConfigError: it is longer than the model's context, or the tower cannot do with less.
    """
    for half in ("target", "reference"):
        data = getattr(config.data, half)
        if data is None or data.text_length is None:
            continue
        context = int(getattr(towers.text, "context_length", data.text_length))
        if data.text_length > context:
            raise ConfigError(
                f"data.{half}.text_length = {data.text_length} exceeds the model's context of {context}"
            )
        if towers.pooled_at is None:
            raise ConfigError(
                f"data.{half}.text_length: the text tower of {config.model.name} needs its whole context"
            )


def _check_noise_floor(values: dict[str, torch.Tensor], config: Config) -> None:
    bound, teacher = NOISE_FLOOR[config.train.precision], config.teacher
    if teacher.mode == "cache":
        # What the audit lets pass is there too.
        bound = max(bound, allowed(teacher.dtype, teacher.tolerance))
    for name, symbol in DIFFERENCE_VECTORS.items():
        if name in values and float(values[name]) > bound:
            raise ConfigError(
                f"mean {symbol} before the first update is {float(values[name]):.2e}, above {bound:.0e} for "
                f"{config.train.precision}: the teacher's embeddings are not this model's; "
                "remove the teacher cache to have it made anew"
            )


def _write_provenance(config: Config, folder: Path, ranks: Ranks) -> None:
    packages = ("dive_fast", "torch", "open_clip_torch", "deepspeed", "numpy")
    provenance: dict[str, Any] = {
        "config": config.model_dump(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.processor() or "cpu",
        "ranks": ranks.world_size,
        "commit": _commit(),
    }
    (folder / "config.json").write_text(json.dumps(provenance, indent=2) + "\n")


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
