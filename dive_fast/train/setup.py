"""A run: all that the loop needs, built from a config."""

import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dive_fast import locks
from dive_fast.checkpoint import lineage
from dive_fast.checkpoint import manifest as checkpoint
from dive_fast.checkpoint.resume import find_checkpoint
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import Config
from dive_fast.data.batch import ReferenceBatch, TargetBatch
from dive_fast.data.classes import remarks, target_names
from dive_fast.data.loaders.loader import loader_options, training_batches
from dive_fast.data.open_dataset import open_reference, open_target
from dive_fast.data.prefetch import Prefetcher
from dive_fast.data.prompts import PromptTable, read_templates
from dive_fast.data.sampler import Order
from dive_fast.data.samples import ReferenceSamples, TargetSamples
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.engine import feature_consistency
from dive_fast.engine.deepspeed_config import check_deepspeed
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.errors import ConfigError
from dive_fast.evaluate.datasets.resolve import Opened, open_sets, remarks_on_missing_classes
from dive_fast.identity import Identity
from dive_fast.methods import registry
from dive_fast.methods.method import Needs
from dive_fast.model.model_identity import model_identity
from dive_fast.model.towers import check_text_length, create, tokenizer_of
from dive_fast.planner.auto_schedule import resolve
from dive_fast.teacher.build import open_teacher, reference_samples
from dive_fast.teacher.teacher import Teacher
from dive_fast.train.linear_probe import make_head
from dive_fast.train.monitors import in_run_folder
from dive_fast.train.preflight import check_sizes
from dive_fast.train.provenance import write_provenance as write_provenance
from dive_fast.train.run_identity import (
    RANKS_MAY_DIFFER,
    check_resumable,
    of_config,
    of_run,
    report_resumed,
    require_equal,
    resolved,
)

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
    evaluation_sets: Opened
    """The sets of ``evaluate.sets``."""
    geometry_source: Source | None
    """The pairs of ``evaluate.geometry``."""
    checkpoint: Path | None
    """The checkpoint that the run resumes from; None: it starts."""
    record: RunRecord
    """What its own checkpoints say of it."""

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
    # Before anything that ranks do together: other settings would have them wait for one another.
    require_equal(ranks, of_config(config, RANKS_MAY_DIFFER) | {"run folder": str(folder)})
    config = in_run_folder(config, folder)
    check_deepspeed(config, ranks.world_size)
    config = resolve(config, ranks)
    seed = config.train.seed
    # Before any model is built: a typo in a path should not cost minutes.
    source = open_target(config.data.target)
    reference = None if config.data.reference is None else open_reference(config.data.reference)
    if ranks.is_main:
        source.report_skipped("data.target")
        if reference is not None:
            reference.report_skipped("data.reference")
    evaluation_sets, geometry = open_sets(config.evaluate.sets, ranks), config.evaluate.geometry
    geometry_source = None if geometry is None else open_reference(geometry)
    torch.manual_seed(seed)
    towers = create(config.model)
    check_text_length(config.data, towers)
    check_sizes(config, folder, towers, 0 if reference is None else len(reference), ranks)
    feature_consistency.prepare(config, towers, ranks)

    data = config.data.target
    names = target_names(source, data.class_names)
    if not source.samples[0].texts:
        for remark in remarks(names, source.class_names, data.class_names):
            ranks.print(f"data.target: {remark}")
        for remark in remarks_on_missing_classes(evaluation_sets, names):
            ranks.print(remark)
    templates = read_templates(data.templates, "data.target.templates")
    prompts = PromptTable(source, names, templates, tokenizer_of(config.model, data.text_length))
    target_samples = TargetSamples(source, prompts, towers.preprocess, towers.pooled_at, seed)
    target_order = Order(
        len(source), data.batch_size, ranks.rank, ranks.world_size, seed, "data.target.batch_size"
    )
    total_steps = target_order.steps_per_epoch * config.train.epochs
    total_steps = min(total_steps, config.train.max_steps or total_steps)

    method = registry.create(config.objective, towers.width)
    used = resolved(config, folder, towers, ranks)
    needed = reference if method.needs.reference else None
    identity = of_run(used, model_identity(towers), source, names, templates, needed, ranks)
    require_equal(ranks, identity)
    found, record = _begin_or_resume(config, folder, identity, total_steps, ranks)
    if ranks.is_main:
        write_provenance(used, folder, ranks, identity, total_steps)
        _warn_of_schedule(config, method.needs, total_steps)
    if method.needs.head:
        towers.head = make_head(config, towers, source, names, ranks, is_trained=found is not None)
    pairs = reference_order = teacher = None
    if method.needs.reference:
        assert reference is not None and config.data.reference is not None
        pairs = reference_samples(config, reference, towers)
        # Another stream than the target's, or both sets would be shuffled alike.
        reference_order = Order(
            *(len(reference), config.data.reference.batch_size, ranks.rank, ranks.world_size, seed + 1),
            key="data.reference.batch_size",
        )
        if method.needs.reference_teacher:
            teacher = open_teacher(config, folder, towers, pairs, ranks)
        if config.train.precision == "bf16" and ranks.is_main:
            logger.warning(
                "train.precision = bf16 drowns difference vectors of 1e-3 in rounding: at |u| = 3e-3 the gradient "
                "of AVL + PVL has cosine 0.45 to that of fp32, in fp16 0.97 (docs/precision.md); prefer fp16"
            )
    engine = Engine(config, towers, method, ranks, total_steps)
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
        evaluation_sets,
        geometry_source,
        found,
        record,
    )


Loaded = tuple[TargetBatch, ReferenceBatch | None]
Batches = Prefetcher[Loaded, StepBatches]


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

    return Prefetcher(load(), ready, device)


LONG_WARMUP = 0.2
"""Share of a run's steps above which a warm-up is reported."""


def _warn_of_schedule(config: Config, needs: Needs, total_steps: int) -> None:
    """Reports settings that train next to nothing."""
    train, warmup = config.train, config.train.warmup_steps
    if train.max_steps is not None and train.max_steps > total_steps:
        logger.warning(
            "train.max_steps = %d, but train.epochs = %d ends the run after %d steps: raise train.epochs",
            *(train.max_steps, train.epochs, total_steps),
        )
    if warmup > LONG_WARMUP * total_steps and warmup > 1:
        reached = min(1.0, total_steps / warmup) * train.learning_rate
        logger.warning(
            "train.warmup_steps = %d of the %d steps of this run: the learning rate %s; set train.warmup_steps=%d "
            "for a tenth of the run",
            warmup,
            total_steps,
            f"only rises, to {reached:.2g} of {train.learning_rate:.2g}"
            if warmup >= total_steps
            else f"rises for {warmup / total_steps:.0%} of it",
            max(1, total_steps // 10),
        )
    if config.data.target.batch_size == 1 and not needs.head:
        logger.warning(
            "data.target.batch_size = 1: the contrastive loss of a single pair is 0, so nothing is learned from "
            "the target set; raise it"
        )


SHARED_SECONDS = 60.0
"""Until a file that one machine has written has to be seen by all others."""


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Validates that all ranks see the run folder that the first one has locked; all ranks call it.

    Raises:
        ConfigError: a rank sees another folder, or none.
    """
    path = folder / locks.FILE
    written = ranks.broadcast(locks.holder_name() if ranks.is_main else None)
    deadline = time.monotonic() + SHARED_SECONDS
    with ranks.raise_on_all(ConfigError):
        # Not on the first rank: it would lose the lock by closing the file.
        while not ranks.is_main and (not path.is_file() or path.read_text() != written):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank {ranks.rank} on {socket.gethostname()} does not see what rank 0 writes to {folder}: "
                    "train.output has to be a folder that all machines share"
                )
            time.sleep(0.5)


def _begin_or_resume(
    config: Config, folder: Path, identity: Identity, total_steps: int, ranks: Ranks
) -> tuple[Path | None, RunRecord]:
    """The checkpoint that a run resumes from, validated to be this run's, and what its own ones will say of it."""
    checkpoints, resume = folder / checkpoint.FOLDER, config.train.resume
    found = find_checkpoint(resume, checkpoints, ranks)
    with ranks.raise_on_all(ConfigError):
        if found is not None and ranks.is_main:
            numbers = checkpoint.read_trainer(found)
            differing = check_resumable(found, checkpoint.read_identity(found), identity)
            if numbers["step"] > total_steps:
                raise ConfigError(
                    f"{found} is after step {numbers['step']}, beyond the {total_steps} of this config: raise "
                    "train.epochs or train.max_steps, set train.output to another folder, or train.resume=never "
                    "to train again here"
                )
            totals = numbers["total_steps"], total_steps
            report_resumed(differing, found, numbers["step"], config, totals)
    with ranks.raise_on_all(ConfigError):
        present = _lineage(folder, checkpoints, resume, found) if ranks.is_main else None
    present = ranks.broadcast(present)
    start = None if present.start is None else Path(present.start)
    return found, RunRecord(present.run, total_steps, identity, start)


def _lineage(folder: Path, checkpoints: Path, resume: str, found: Path | None) -> lineage.Lineage:
    """The run that the folder's checkpoints will belong to, on the first rank."""
    present = None if resume == "never" else lineage.read(checkpoints)
    try:
        if found is None:
            if present is None:
                return lineage.begin(folder, checkpoints)
        else:
            run = checkpoint.read_trainer(found)["run"]
            if resume != "auto":
                is_own = present is not None and (run == present.run or present.start == str(found.resolve()))
                return lineage.begin(folder, checkpoints, found, keep=is_own)
            if present is None:
                return lineage.resume(checkpoints, run)
        assert present is not None
        return present if present.is_begun else lineage.complete(folder, checkpoints, present)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot put away what an older run has left: {error}") from error
