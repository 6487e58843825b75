"""Everything that the training loop needs, built from a config."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import Config, TargetConfig
from dive_fast.config.worker_counts import cores_of_rank
from dive_fast.data.batch import ReferenceBatch, TargetBatch
from dive_fast.data.captions import caption_counts, remark_on_captions
from dive_fast.data.classes import remarks, target_names
from dive_fast.data.loaders.loader import loader_options, training_batches
from dive_fast.data.open_dataset import open_reference, open_stream, open_target
from dive_fast.data.prefetch import Prefetcher
from dive_fast.data.prompt_files import Template, read_templates
from dive_fast.data.prompts import PromptTable, SecondPrompts, warn_about_class_texts
from dive_fast.data.sampler import Classes, Order, StepOrder
from dive_fast.data.samples import ReferenceSamples, TargetSamples
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.tar_stream import TarStream
from dive_fast.data.stream_order import StreamOrder
from dive_fast.data.transforms import Augmentation
from dive_fast.distributed import Ranks
from dive_fast.engine import feature_consistency, trained_parameters
from dive_fast.engine.deepspeed_config import check_deepspeed, deepspeed_section
from dive_fast.engine.step import Engine, StepBatches, check_hooks, check_projection
from dive_fast.errors import naming
from dive_fast.evaluation.datasets.resolve import (
    Opened,
    open_sets,
    remarks_on_missing_classes,
    remarks_on_untrained_classes,
)
from dive_fast.evaluation.geometry.embed import open_pairs
from dive_fast.evaluation.text_features import embed_texts
from dive_fast.methods import registry
from dive_fast.methods.method import Method, Start, overrides
from dive_fast.model import prompt_file
from dive_fast.model.model_identity import model_identity
from dive_fast.model.towers import Towers, check_text_length, create, tokenizer_of
from dive_fast.planner.auto_schedule import resolve
from dive_fast.teacher.build import open_teacher, reference_samples
from dive_fast.teacher.teacher import Teacher
from dive_fast.training.forgetting_probe import HeldOut, hold_out_images
from dive_fast.training.guard_rails import warn_of_evaluation, warn_of_schedule
from dive_fast.training.linear_probe import make_head
from dive_fast.training.preflight import check_sizes
from dive_fast.training.provenance import write_provenance
from dive_fast.training.run_folder import find_resumable, start_or_resume
from dive_fast.training.run_identity import RANKS_MAY_DIFFER, config_identity, fill_in, require_equal, run_identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that the training loop needs."""

    config: Config
    folder: Path
    ranks: Ranks
    engine: Engine
    target: TargetSamples
    target_order: Order
    reference: ReferenceSamples | None
    reference_order: StepOrder | None
    probe: ReferenceSamples | None
    """The complete reference set if pairs of it are held out for the forgetting probe."""
    held_out: HeldOut
    """The reference pairs that are not trained on."""
    teacher: Teacher | None
    total_steps: int
    class_names: tuple[str, ...]
    """Class names of the target set; empty where it has prompts and no classes."""
    evaluation_sets: Opened
    """The sets of ``evaluate.sets``."""
    geometry_source: Source | None
    """The pairs of ``evaluate.geometry``."""
    checkpoint: Path | None
    """The checkpoint that the run resumes from; None for a new run."""
    record: RunRecord
    """The run's description in its checkpoints."""

    @property
    def images_per_step(self) -> int:
        """Images of both halves, over all ranks."""
        data = self.config.data
        reference = 0 if data.reference is None or self.reference is None else data.reference.batch_size
        return data.target.batch_size + reference


class _Sources(NamedTuple):
    """All data sets of a run, opened."""

    target: Source
    reference: Source | None
    """None where there is none, or a stream."""
    stream: TarStream | None
    evaluation_sets: Opened
    geometry: Source | None


def build(config: Config, folder: Path, ranks: Ranks) -> Run:
    """Opens the data, builds the model, its head and the teacher, and hands the model to DeepSpeed.

    Raises:
        ConfigError, DataError: invalid config or data; the message says what to change.
    """
    # Before the first collective operation: ranks with different settings would wait for each other.
    require_equal(ranks, config_identity(config, RANKS_MAY_DIFFER) | {"run folder": str(folder)})
    check_deepspeed(config, ranks.world_size)
    config = resolve(config, ranks)
    # Small things first: opening sets of millions can take minutes.
    evaluation_sets = open_sets(config.evaluate.sets, ranks)
    torch.manual_seed(config.train.seed)
    towers = create(config.model)
    check_text_length(config.data, towers)
    feature_consistency.prepare(config, towers, ranks)
    needs, section = registry.needs(config.objective), deepspeed_section(config, ranks.world_size)
    _check_method(config, section, towers)
    templates = read_templates(config.data.target.templates, "data.target.templates")
    complete = fill_in(config, folder, towers, ranks)
    checkpoint = find_resumable(config.train, folder, config_identity(complete), ranks)
    sources = _open_sources(config, evaluation_sets, ranks)
    # Prompts leave the embeddings of pairs as they are.
    held_out = HeldOut() if needs.prompts else _hold_out(config, sources.reference)
    classes = _classes(config.data.target, sources.target, ranks)
    target_order = _order(config, "target", len(sources.target), ranks, classes=classes)
    reference_order = _reference_order(config, sources, ranks, held_out) if needs.reference else None

    _check_sizes(config, folder, towers, sources.reference, ranks)
    class_names = _class_names(config, sources, ranks)
    total_steps = target_order.steps_per_epoch * config.train.epochs
    total_steps = min(total_steps, config.train.max_steps or total_steps)

    method = registry.create(
        config.objective,
        towers.width,
        total_steps=total_steps,
        steps_per_epoch=target_order.steps_per_epoch,
        seed=config.train.seed,
    )
    second_templates = method.target_loss.second_templates() if method.needs.second_prompts else ()
    target = _target_samples(config, sources.target, class_names, templates, second_templates, towers, ranks)
    identity = run_identity(
        *(complete, model_identity(towers), sources.target, class_names, templates),
        reference=(sources.stream or sources.reference) if needs.reference else None,
        ranks=ranks,
        total_steps=total_steps,
        second_templates=second_templates,
        num_held_out=len(held_out.untrained),
    )
    require_equal(ranks, identity)
    record = start_or_resume(
        *(config.train, folder, checkpoint, identity, total_steps, target_order.steps_per_epoch, ranks)
    )
    if ranks.is_main:
        write_provenance(complete, folder, ranks, identity, total_steps)
        warn_of_schedule(config, needs, total_steps)
        evaluated = {name: opened.source for name, opened in sources.evaluation_sets.items()}
        warn_of_evaluation(config, sources.target, evaluated)

    if needs.head:
        is_trained = checkpoint is not None
        towers.head = make_head(config, towers, sources.target, class_names, ranks, is_trained)
    probe = reference = teacher = None
    if held_out.samples and config.data.reference is not None:
        probe = open_pairs(config.model, config.data.reference, towers, sources.reference)
    if needs.reference:
        images = sources.stream or sources.reference
        assert images is not None
        reference = reference_samples(config, images, towers).with_kept_tokens(ranks)
        reference = reference.without(held_out.untrained)
        if needs.reference_teacher:
            teacher = open_teacher(config, folder, towers, reference, ranks)
        if config.train.precision == "bf16" and ranks.is_main:
            logger.warning(
                "train.precision = bf16 rounds away difference vectors of 1e-3: at |u| = 3e-3 the gradient of the "
                "difference losses has cosine 0.45 to that of fp32, in fp16 0.97 (docs/precision.md); prefer fp16"
            )
    _start_method(method, config, towers, () if target.prompts.are_texts else class_names, templates, ranks)
    if remark := trained_parameters.adapt(config.model, towers, method, config.train.seed):
        ranks.print(remark)
    if towers.prompts is not None:
        tokenizer = tokenizer_of(config.model)
        warn_about_class_texts(class_names, method.target_loss.classes.texts, tokenizer)
        towers.prompts.origin = prompt_file.Origin(
            prompt_file.fit_of(towers, tokenizer),
            *(config.objective.name or method.target_loss.name, config.model.name, identity["model"]["weights"]),
            *(tuple(template("{}") for template in templates), class_names),
        )
    engine = Engine(config, towers, method, ranks, total_steps, target_order.steps_per_epoch)
    ranks.print(engine.remark)
    ranks.print(_describe_workers(config))
    if engine.projection is not None:
        ranks.print(engine.projection.remark)
    return Run(
        config=config,
        folder=folder,
        ranks=ranks,
        engine=engine,
        target=target,
        target_order=target_order,
        reference=reference,
        reference_order=reference_order,
        probe=probe,
        held_out=held_out,
        teacher=teacher,
        total_steps=total_steps,
        class_names=class_names,
        evaluation_sets=sources.evaluation_sets,
        geometry_source=sources.geometry,
        checkpoint=checkpoint,
        record=record,
    )


def _check_method(config: Config, section: dict[str, Any], towers: Towers) -> None:
    """Checks a method's files and hooks by creating it once; the run's own method needs the number of steps.

    Args:
        section: the DeepSpeed config.

    Raises:
        ConfigError, DataError: a file of the method is missing, or the model or an option does not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        method = registry.create(config.objective, towers.width, seed=config.train.seed)
    if method.needs.second_prompts:
        method.target_loss.second_templates()
    check_hooks(section, method, config.train.schedule)
    check_projection(section, config.projection)
    method.penalty(towers)  # raises where a tower lacks the parameters of the penalty
    trained_parameters.check(config.model, config.train, towers, method)
    feature_consistency.check_config(config, trained_parameters.consistency_of(config.model, towers))


def _open_sources(config: Config, evaluation_sets: Opened, ranks: Ranks) -> _Sources:
    data, geometry = config.data, config.evaluate.geometry
    target = open_target(data.target, ranks=ranks)
    reference = stream = None
    if data.reference is not None and data.reference.order == "stream":
        stream = open_stream(data.reference)
        ranks.print(f"data.reference: a stream of {len(stream.tars):,} tars; nothing is scanned before it is read")
    elif data.reference is not None:
        reference = open_reference(data.reference, ranks=ranks)
    if target.held_out:
        ranks.print(f"data.target: {target.held_out}")
    if ranks.is_main:
        target.report_skipped("data.target")
        if reference is not None:
            reference.report_skipped("data.reference")
            for remark in remark_on_captions(reference):
                ranks.print(f"data.reference: {remark}")
        for key, reason in () if stream is None else stream.skipped:
            logger.warning("data.reference: %s: left out: %s", key, reason)
    pairs = None if geometry is None else open_reference(geometry, ranks=ranks)
    return _Sources(target, reference, stream, evaluation_sets, pairs)


def _check_sizes(config: Config, folder: Path, towers: Towers, reference: Source | None, ranks: Ranks) -> None:
    """Checks that batches, checkpoints and the teacher cache fit the machine."""
    counts = None if reference is None else caption_counts(reference)
    pairs = 0 if reference is None else len(reference)
    check_sizes(config, folder, towers, pairs, ranks, pairs if counts is None else int(counts.sum()))


def _class_names(config: Config, sources: _Sources, ranks: Ranks) -> tuple[str, ...]:
    """Class names of the target set, in label order; prints remarks on them."""
    data = config.data.target
    with naming("data.target.class_names"):
        names = target_names(sources.target, data.class_names, data.classes)
    if not sources.target.samples.has_texts:
        for remark in remarks(names, sources.target.class_names, data.class_names):
            ranks.print(f"data.target: {remark}")
        for remark in remarks_on_missing_classes(sources.evaluation_sets, names):
            ranks.print(remark)
        if ranks.is_main:
            for remark in remarks_on_untrained_classes(config.evaluate, sources.evaluation_sets, names):
                logger.warning("%s", remark)
    return names


def _describe_workers(config: Config) -> str:
    """The workers of all loaders, which ``auto`` chooses by the cores."""
    data, evaluate = config.data, config.evaluate
    counts = [f"{data.target.workers} for data.target ({data.target.loader})"]
    if data.reference is not None:
        counts.append(f"{data.reference.workers} for data.reference ({data.reference.loader})")
    counts.append(f"{evaluate.workers} for evaluations")
    return f"loader workers on each rank: {', '.join(counts)}; it has {cores_of_rank()} cores"


def _target_samples(
    config: Config,
    source: Source,
    class_names: Sequence[str],
    templates: Sequence[Template],
    second_templates: Sequence[Template],
    towers: Towers,
    ranks: Ranks,
) -> TargetSamples:
    tokenizer, seed = tokenizer_of(config.model, config.data.target.text_length), config.train.seed
    with naming("data.target.class_names"):
        prompts, second = PromptTable(source, class_names, templates, tokenizer, ranks), None
    if second_templates:
        second = SecondPrompts(prompts, second_templates, tokenizer)
        second.warn_about_truncated(source, seed)
    augmentation = Augmentation(config.data.target.crop_scale, config.data.target.horizontal_flip)
    return TargetSamples(source, prompts, towers.preprocess, towers.pooled_at, seed, second, augmentation)


def _start_method(
    method: Method,
    config: Config,
    towers: Towers,
    class_names: tuple[str, ...],
    templates: tuple[Template, ...],
    ranks: Ranks,
) -> None:
    """Calls the parts' ``start`` with the pre-trained towers, in evaluation mode and in the run's precision.

    Args:
        class_names: empty where the target set has prompts and no classes.

    Raises:
        ConfigError: the model or the target lacks something that a part needs.
    """
    if not any(overrides(part, "start") for part in method.parts):
        return
    towers.to(ranks.device).eval().set_precision(config.train.precision)
    tokenizer = tokenizer_of(config.model)

    def embed(texts: Sequence[str]) -> Tensor:
        return embed_texts(towers, tokenizer, texts, ranks)

    method.start(Start(embed, tokenizer, towers.vocabulary, towers.pooled_at, class_names, templates, towers))


def _classes(data: TargetConfig, source: Source, ranks: Ranks) -> Classes | None:
    """The samples of each class where classes are drawn equally often; otherwise None.

    Raises:
        DataError: classes are to be drawn, and the set has none.
    """
    if data.balance != "class":
        return None
    with naming("data.target"):
        classes = Classes.of(source.samples.labels)
    ranks.print(f"data.target: classes have {classes.describe()}; balance = class draws each equally often")
    return classes


def _hold_out(config: Config, reference: Source | None) -> HeldOut:
    """The reference pairs for the forgetting probe."""
    data = config.data.reference
    if data is not None and data.order == "stream":
        return HeldOut(remark="no forgetting probe: data.reference.order = stream knows no pairs before training")
    if reference is None or data is None:
        return hold_out_images(config.evaluate.probe, None, 0)
    return hold_out_images(config.evaluate.probe, reference, data.batch_size)


def _order(
    config: Config,
    half: str,
    count: int,
    ranks: Ranks,
    held_out: tuple[int, ...] = (),
    classes: Classes | None = None,
) -> Order:
    """The order of a half's samples."""
    # The halves have different random streams; otherwise both sets would be shuffled alike.
    seed = config.train.seed + (half == "reference")
    batch_size = getattr(config.data, half).batch_size
    return Order(
        count, batch_size, ranks.rank, ranks.world_size, seed, f"data.{half}.batch_size", held_out, classes
    )


def _reference_order(config: Config, sources: _Sources, ranks: Ranks, held_out: HeldOut) -> StepOrder:
    """The order of the reference pairs."""
    if sources.stream is not None:
        assert config.data.reference is not None
        place = ranks.rank, ranks.world_size, config.train.seed + 1
        return StreamOrder(sources.stream, config.data.reference.batch_size, *place)
    assert sources.reference is not None
    return _order(config, "reference", len(sources.reference), ranks, held_out.untrained)


LoadedBatches = tuple[TargetBatch, ReferenceBatch | None]
Batches = Prefetcher[LoadedBatches, StepBatches]


def batches(run: Run, steps: range) -> Batches:
    """The batches of the given steps, on this rank's device, with the rows of a cached teacher."""
    data, device, every = run.config.data, run.ranks.device, run.config.objective.reference_every
    targets = training_batches(
        run.target, run.target_order, steps, loader_options(run.config, data.target, run.ranks)
    )
    references: Iterator[ReferenceBatch] = iter(())
    if run.reference is not None and run.reference_order is not None and data.reference is not None:
        options = loader_options(run.config, data.reference, run.ranks)
        with_reference = range(-(-steps.start // every), -(-steps.stop // every))
        references = training_batches(run.reference, run.reference_order, with_reference, options)

    def load() -> Iterator[LoadedBatches]:
        for step, target in zip(steps, targets, strict=True):
            yield target, next(references) if run.reference is not None and step % every == 0 else None

    def move(loaded: LoadedBatches) -> StepBatches:
        target, reference = loaded
        if reference is None:
            return StepBatches(target.to(device))
        reference = reference.to(device)
        rows = run.teacher(reference) if run.teacher is not None and run.teacher.runs_ahead else None
        return StepBatches(target.to(device), reference, rows)

    return Prefetcher(load(), move, device)
