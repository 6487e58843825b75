"""A run: all that the loop needs, built from a config."""

import json
import logging
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dive_fast import objective, steadiness
from dive_fast.checkpoint import format as checkpoint
from dive_fast.config import Config, ConfigError
from dive_fast.data.ahead import Ahead
from dive_fast.data.batch import ReferenceBatch, TargetBatch
from dive_fast.data.loader import training_batches
from dive_fast.data.order import Order
from dive_fast.data.prompts import PromptTable, read_class_names, read_templates
from dive_fast.data.samples import ReferenceSamples, TargetSamples
from dive_fast.data.sets import open_reference, open_target
from dive_fast.deepspeed_section import check_deepspeed
from dive_fast.engine import Engine, StepBatches
from dive_fast.evaluate.zero_shot import open_set
from dive_fast.files import write_whole
from dive_fast.probe import make_head
from dive_fast.ranks import Ranks
from dive_fast.schedule import resolve
from dive_fast.teacher.build import loader_options, open_teacher, reference_samples
from dive_fast.teacher.teachers import Teacher
from dive_fast.towers import Towers, create, tokenizer_of

logger = logging.getLogger(__name__)


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
    class_names: tuple[str, ...]
    """Of the target set; empty where it has prompts and no classes."""
    checkpoint: Path | None
    """Where the run goes on from; None: from its start."""

    @property
    def images_per_step(self) -> int:
        """Of both halves, on all ranks."""
        data = self.config.data
        reference = 0 if data.reference is None or self.reference is None else data.reference.batch_size
        return data.target.batch_size + reference


def build(config: Config, folder: Path, ranks: Ranks) -> Run:
    """Opens the data, builds the models and the teacher, and hands the student to DeepSpeed.

    Raises:
        ConfigError, DataError: the user's to mend; the message says how.
    """
    check_deepspeed(config, ranks.world_size)
    config = resolve(config, ranks)
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
    if config.evaluate.geometry is not None:
        open_reference(config.evaluate.geometry)
    torch.manual_seed(seed)
    towers = create(config.model)
    check_text_length(config, towers)
    steadiness.prepare(config, towers, ranks)

    data = config.data.target
    names = source.class_names if data.class_names is None else read_class_names(data.class_names)
    templates = read_templates(data.templates)
    prompts = PromptTable(source, names, templates, tokenizer_of(config.model, data.text_length))
    target_samples = TargetSamples(source, prompts, towers.preprocess, towers.pooled_at, seed)
    target_order = Order(len(source), data.batch_size, ranks.rank, ranks.world_size, seed)
    total_steps = target_order.steps_per_epoch * config.train.epochs
    total_steps = min(total_steps, config.train.max_steps or total_steps)

    found = checkpoint.find(config.train.resume, folder / checkpoint.FOLDER, ranks)
    goal = objective.create(config.objective, towers.width)
    if goal.needs_head:
        towers.head = make_head(config, towers, source, names, ranks, is_trained=found is not None)
    pairs = reference_order = teacher = None
    if goal.needs_reference:
        assert reference is not None and config.data.reference is not None
        pairs = reference_samples(config, reference, towers)
        # Another stream than the target's, or both sets would be shuffled alike.
        reference_order = Order(
            len(reference), config.data.reference.batch_size, ranks.rank, ranks.world_size, seed + 1
        )
        if goal.needs_teacher:
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
        names,
        found,
    )


Loaded = tuple[TargetBatch, ReferenceBatch | None]
Batches = Ahead[Loaded, StepBatches]


def batches(run: Run, steps: range) -> Batches:
    """The batches of the given steps on this rank's device, with the rows of a teacher who only looks them up."""
    data, device, every = run.config.data, run.ranks.device, run.config.objective.reference_every
    targets = training_batches(
        run.target, run.target_order, steps, loader_options(run.config, data.target, run.ranks)
    )
    references: Iterator[ReferenceBatch] = iter(())
    if run.reference is not None and run.reference_order is not None and data.reference is not None:
        options = loader_options(run.config, data.reference, run.ranks)
        with_reference = range(-(-steps.start // every), -(-steps.stop // every))
        references = training_batches(run.reference, run.reference_order, with_reference, options)

    def load() -> Iterator[Loaded]:
        for step, target in zip(steps, targets, strict=True):
            yield target, next(references) if run.reference is not None and step % every == 0 else None

    def ready(batches: Loaded) -> StepBatches:
        target, reference = batches
        if reference is None:
            return StepBatches(target.to(device))
        reference = reference.to(device)
        rows = run.teacher(reference) if run.teacher is not None and run.teacher.runs_ahead else None
        return StepBatches(target.to(device), reference, rows)

    return Ahead(load(), ready, device)


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


def _write_provenance(config: Config, folder: Path, ranks: Ranks) -> None:
    packages = ("dive_fast", "torch", "open_clip_torch", "deepspeed", "numpy")
    provenance: dict[str, Any] = {
        "config": config.model_dump(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.processor() or "cpu",
        "ranks": ranks.world_size,
        "commit": _commit(),
    }
    write_whole(folder / "config.json", (json.dumps(provenance, indent=2) + "\n").encode())


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
