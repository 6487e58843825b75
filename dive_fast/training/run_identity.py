"""The identity of a run: everything that determines its result. Compared when a run resumes, and between ranks.

It is the complete config with paths replaced by contents, and is stored in checkpoints. A changed key stops a
resume unless it is listed here: keys of :data:`NO_RESULT` change nothing that is kept, keys of :data:`CONTINUES`
are changed on purpose to train longer, those of :data:`ROUNDING` change only the last bits. A new key stops a
resume until it is listed.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dive_fast import numerics
from dive_fast.config.schema import Config, ModelConfig, TrainConfig
from dive_fast.data.loaders.loader import loader_options
from dive_fast.data.prompt_files import Template
from dive_fast.data.sources.source import Images, Source
from dive_fast.data.text_tokenizer import TOKENIZER_PROBES
from dive_fast.distributed import Ranks
from dive_fast.engine.deepspeed_config import deepspeed_section
from dive_fast.engine.optimizer import learning_rate_schedule
from dive_fast.errors import ConfigError
from dive_fast.evaluation.datasets.resolve import with_defaults
from dive_fast.identity import Difference, Identity, differences, digest, versions
from dive_fast.methods import registry
from dive_fast.model.towers import Towers, tokenizer_of
from dive_fast.teacher.audit import allowed
from dive_fast.teacher.build import cache_folder
from dive_fast.teacher.fingerprint import decoder

logger = logging.getLogger(__name__)

LOCATIONS = (
    *("model.name", "model.pretrained"),
    *("data.*.format", "data.*.path", "data.*.image_root", "data.*.class_names", "data.*.templates"),
    *("data.*.annotations", "data.*.split", "data.*.image_column", "data.*.label_column", "data.*.text_column"),
    *("objective.backgrounds", "objective.target.backgrounds", "teacher.path", "train.output"),
)
"""Keys whose contents are compared instead, or which only give a location."""
PER_MACHINE = ("data.*.workers", "data.*.hw_decoder_load", "evaluate.workers")
NO_RESULT = (
    *LOCATIONS,
    *PER_MACHINE,
    *("teacher.batch_size", "teacher.audit", "teacher.tolerance", "teacher.verify"),
    *("train.log_every", "train.trace_steps", "train.checkpoint_every", "train.keep_last", "train.keep_best"),
    *("train.on_save_error", "train.resume", "train.nonfinite_limit", "train.rank_timeout"),
    *("model.license", "evaluate.batch_size", "evaluate.baseline", "evaluate.probe", "track"),
    *("deepspeed.monitor_config", "deepspeed.flops_profiler", "deepspeed.comms_logger", "deepspeed.timers"),
    *("deepspeed.steps_per_print", "deepspeed.wall_clock_breakdown", "deepspeed.dump_state"),
    *("deepspeed.memory_breakdown", "deepspeed.train_batch_size", "deepspeed.gradient_accumulation_steps"),
    *("deepspeed.train_micro_batch_size_per_gpu",),
)
"""Keys that change neither weights nor metrics; never compared."""
RANKS_MAY_DIFFER = (
    *("model.name", "model.pretrained", "data.*.path", "data.*.image_root", "data.*.class_names"),
    *(
        "data.*.annotations",
        "data.*.templates",
        "objective.backgrounds",
        "objective.target.backgrounds",
        *PER_MACHINE,
    ),
)
"""Keys that may differ between ranks; the contents behind paths may not."""
CONTINUES = ("train.epochs", "train.max_steps", "train.export_ema", "evaluate.*")
"""Keys that users change on purpose, to train longer or to select the best weights differently; reported."""
TOLD_BY_WEIGHTS = ("name", "pretrained", "random")
"""Keys of ``model`` that a run's identity replaces by the architecture and the digest of the weights."""
ADDED: dict[str, Any] = {
    **{"data.target.balance": "none", "data.target.crop_scale": [0.9, 1.0], "data.target.horizontal_flip": 0.0},
    **{
        "data.reference.captions": "one",
        "data.reference.order": "indexed",
        "data.reference.stream_buffer": 20_000,
        "projection": {"name": "none"},
        "data.target.classes": "all",
        "data.target.shots_seed": 1,
        "train.optimizer": "adamw",
        "train.momentum": 0.9,
        "evaluate.loader": "plain",
    },
}
"""Keys that checkpoints of earlier versions lack, with the only values that they had."""
ROUNDING = (
    *("data.*.loader", "data.*.decoder", "teacher.mode", "train.schedule", "train.micro_batch_size"),
    *("train.activation_checkpointing", "train.fast_blocks", "train.compile", "deepspeed.zero_optimization"),
    *("versions.*", "ranks"),
)
"""Keys that change only the last bits of a result; reported."""


NULLS = {
    "model.pretrained": "the model brings its weights, or starts from random ones",
    "model.logit_scale_max": "no bound",
    "model.lora": "all weights are trained",
    "model.license": "unknown: that of the pre-trained weights applies",
    "data.reference": "no reference set",
    "data.target.holdout": "no sample is held out",
    "data.target.shots": "all samples of each class",
    "data.*.image_root": "the format has none",
    "data.*.annotations": "the file next to the questions, or the format has none",
    "data.*.split": "the only split, or the format has none",
    "data.*.*_column": "the default column, or the format has none",
    "data.target.class_names": "the names in the data set",
    "objective.name": "a pair of losses without a name",
    "objective.weight": "no reference loss",
    "objective.target": "that of objective.name",
    "objective.reference": "that of objective.name",
    "*.backgrounds": "the sentences of this project",
    "teacher.path": "no cache",
    "teacher.tolerance": "no cache",
    "train.max_steps": "no limit besides train.epochs",
    "train.micro_batch_size": "the full batch",
    "train.layer_decay": "one learning rate",
    "train.ema": "no average",
    "train.checkpoint_every": "none between evaluations",
    "evaluate.geometry": "not measured",
    "evaluate.geometry.image_root": "the format has none",
    "evaluate.geometry.split": "the only split, or the format has none",
    "evaluate.geometry.*_column": "the default column, or the format has none",
    "evaluate.every_*": "no evaluation during training",
    "evaluate.during": "no evaluation during training",
    "evaluate.select": "the last weights",
    "evaluate.patience": "no early stopping",
    "evaluate.sets.*.format": "detected, as for every known data set",
    "evaluate.sets.*.dataset": "a set of the user's own",
    "evaluate.sets.*.image_root": "the folder of the questions, or the format has none",
    "evaluate.sets.*.annotations": "the file next to the questions, or the format has none",
    "evaluate.sets.*.answers": "no questions",
    "evaluate.sets.*.questions": "all questions, or none",
    "evaluate.sets.*.holdout": "all samples are measured",
    "evaluate.sets.*.split": "the only split, or the format has none",
    "evaluate.sets.*.*_column": "the default column, or the format has none",
    "evaluate.sets.*.class_names": "the names in the data set",
    "evaluate.sets.*.templates": "those of the known data set, or none without classes",
    "evaluate.sets.*.role": "no average",
    "deepspeed.*": "as DeepSpeed defines it",
}
"""The keys that may be null in a run's ``config.json``, and the meaning; :func:`fill_in` replaces all others."""


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted key, or a section around it, matches a pattern; ``*`` stands for one part or more."""
    parts = key.split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in patterns)


def fill_in(config: Config, folder: Path, towers: Towers, ranks: Ranks) -> Config:
    """The config with the defaults of this run filled in, for its identity and its ``config.json``.

    Args:
        config: a config whose schedule is chosen.
        towers: the model, for the length of its texts.
    """
    data, objective, teacher, evaluate = config.data, config.objective, config.teacher, config.evaluate
    halves: dict[str, Any] = {}
    for half in ("target", "reference"):
        if (section := getattr(data, half)) is not None:
            length = section.text_length or towers.context_length
            halves[half] = _with_image_root(section).model_copy(update={"text_length": length})
    objective, choice = registry.resolve(objective), registry.choose(objective)
    if objective.weight is None and choice.needs.reference:
        objective = objective.model_copy(update={"weight": choice.default_weight})
    if choice.needs.reference_teacher and teacher.mode == "cache":
        cache = {
            "path": str(cache_folder(teacher, folder)),
            "tolerance": allowed(teacher.dtype, teacher.tolerance),
        }
        teacher = teacher.model_copy(update=cache)
    if evaluate.during is None and (evaluate.every_steps or evaluate.every_epochs):
        evaluate = evaluate.model_copy(update={"during": list(evaluate.sets)})
    evaluate = evaluate.model_copy(
        update={
            "sets": {name: with_defaults(each) for name, each in evaluate.sets.items()},
            "geometry": None if evaluate.geometry is None else _with_image_root(evaluate.geometry),
        }
    )
    model, lora = config.model, config.model.lora
    if lora is not None and lora.alpha is None:
        model = model.model_copy(update={"lora": lora.model_copy(update={"alpha": float(lora.rank)})})
    deepspeed = dict(config.deepspeed)
    if zero := deepspeed_section(config, ranks.world_size).get("zero_optimization"):
        deepspeed["zero_optimization"] = deepspeed["zero_optimization"] | {"stage": zero.get("stage", 0)}
    return config.model_copy(
        update={
            "model": model,
            "data": data.model_copy(update=halves),
            "objective": objective,
            "teacher": teacher,
            "train": config.train.model_copy(update={"output": str(folder)}),
            "evaluate": evaluate,
            "deepspeed": deepspeed,
        }
    )


def _with_image_root(section: Any) -> Any:
    """A section of captioned or labelled images with its default ``image_root``."""
    root = section.image_root or (str(Path(section.path).parent) if section.format in ("csv", "vqa") else None)
    return section.model_copy(update={"image_root": root})


def config_identity(config: Config, without: Sequence[str] = NO_RESULT) -> Identity:
    """The part of a run's identity that stands in its config, without the keys of ``without``."""
    return config_identity_of(config.model_dump(mode="json"), "", without)


def config_identity_of(tree: Mapping[str, Any], prefix: str, without: Sequence[str] = NO_RESULT) -> Identity:
    """As :func:`config_identity`, of a section whose dotted keys begin with ``prefix``."""
    identity = {}
    for key, value in tree.items():
        if not matches(f"{prefix}{key}", without):
            is_section = isinstance(value, dict)
            identity[key] = config_identity_of(value, f"{prefix}{key}.", without) if is_section else value
    return identity


def settings_of(model: ModelConfig) -> Identity:
    """The settings of a model that its weights do not tell: how they are trained. Defaults are left out."""
    section = config_identity_of(model.model_dump(mode="json"), "model.")
    return {key: value for key, value in section.items() if key not in TOLD_BY_WEIGHTS and value not in (None, [])}


def run_identity(
    config: Config,
    model: Identity,
    target: Source,
    class_names: Sequence[str],
    templates: Sequence[Template],
    reference: Images | None,
    ranks: Ranks,
    total_steps: int,
    second_templates: Sequence[Template] = (),
    num_held_out: int = 0,
) -> Identity:
    """Everything that determines a run's result.

    Args:
        config: the config from :func:`fill_in`.
        model: the pre-trained model, from :func:`dive_fast.model.model_identity.model_identity`.
        class_names: class names of the target set, in label order; empty where it has prompts and no classes.
        templates: templates of the prompts.
        reference: None for a method without a reference batch.
        second_templates: templates of the second prompts; empty for a method without them.
        total_steps: steps of the complete run, compared where the method depends on them.
        num_held_out: reference pairs that are not trained on, those of the images chosen by ``evaluate.probe``.
    """
    identity = config_identity(config)
    identity["objective"] = {key: value for key, value in identity["objective"].items() if value is not None}
    tokens = tokenizer_of(config.model)(list(TOKENIZER_PROBES)).numpy().tobytes()
    identity["model"] = model | {"tokenizer": hashlib.sha256(tokens).hexdigest()} | settings_of(config.model)
    half = identity["data"]["target"]
    half["content"] = target.digest()
    if class_names:
        half["class_names"] = list(class_names)
        half["templates"] = [template("{}") for template in templates]
    if second_templates:
        half["second_templates"] = [template("{}") for template in second_templates]
    half["decoder"] = decoder(loader_options(config, config.data.target, ranks))
    if reference is None:
        # The section has no effect, whether it is there or not.
        identity["data"].pop("reference", None)
    elif config.data.reference is not None:
        half = identity["data"]["reference"]
        half["content"] = reference.digest()
        if not isinstance(reference, Source):
            half["stream_ranks"] = ranks.world_size  # tars are dealt to the ranks
        half["decoder"] = decoder(loader_options(config, config.data.reference, ranks))
        if num_held_out:
            half["held_out"] = num_held_out
    if registry.needs(config.objective).run_length:
        identity["total_steps"] = total_steps
    return identity | {"precision": numerics.state(), "versions": versions(), "ranks": ranks.world_size}


def require_equal(ranks: Ranks, identity: Identity) -> None:
    """Validates that all ranks have the same identity; all ranks call it.

    Raises:
        ConfigError: names the first rank and key that differ, on every rank.
    """
    if len(set(ranks.collect(digest(identity)))) == 1:
        return
    first, *others = ranks.collect(identity)
    for rank, other in enumerate(others, start=1):
        if unequal := differences(first, other):
            keys = [difference.key for difference in unequal]
            more = "" if len(keys) == 1 else f" (and in {len(keys) - 1} more: {', '.join(keys[1:6])})"
            value_of_first, value = unequal[0].shown()
            raise ConfigError(
                f"rank {rank} differs from rank 0 in {keys[0]}: {value}, not {value_of_first}{more}; start all "
                "ranks with the same command, files and packages"
            )
    raise AssertionError("digests differ where identities do not")


def check_resumable(checkpoint: Path, stored: Identity, current: Identity) -> list[Difference]:
    """Compares the run of a checkpoint with the present one; returns the differences that do not stop a resume.

    Raises:
        ConfigError: the result would differ from that of either run; names every difference.
    """
    # Options that the method lacks have no effect.
    objective = {key: value for key, value in stored["objective"].items() if key in current["objective"]}
    changes = [
        change
        for change in differences({**stored, "objective": objective}, current)
        if change.stored is not None or change.current != ADDED.get(change.key, change.stored)
    ]
    _refuse(checkpoint, changes)
    return changes


def check_settings(checkpoint: Path, stored: Identity, config: Identity) -> None:
    """Compares the settings of a checkpoint's run with the present ones, as far as they are known without data.

    Args:
        stored: the identity of the checkpoint's run.
        config: the part of the present run's identity that stands in its config.

    Raises:
        ConfigError: as :func:`check_resumable`, which compares everything else later.
    """
    changes = differences(stored, config)
    _refuse(checkpoint, [change for change in changes if None not in (change.stored, change.current)])


def _refuse(checkpoint: Path, changes: Sequence[Difference]) -> None:
    """Refuses to resume after changes that change the result."""
    refused = [change for change in changes if not matches(change.key, (*CONTINUES, *ROUNDING))]
    if refused:
        listed = "; ".join(map(_describe, refused))
        raise ConfigError(
            f"{checkpoint} belongs to a run with other settings ({listed}): set them back to continue that run, "
            "set train.output to another folder to keep both, or train.resume=never to train again here"
        )


def _describe(change: Difference) -> str:
    """A difference as text, without the digests of data."""
    if change.key == "total_steps":
        return (
            f"{change}, set by train.epochs and train.max_steps; this objective depends on the length of the run"
        )
    if change.key == "data.reference.held_out":
        return f"evaluate.probe: {change.stored or 0} pairs held out there, {change.current or 0} here"
    if change.key == "data.reference.stream_ranks":
        return f"data.reference: its tars are dealt to {change.stored} ranks there, {change.current} here"
    section = change.key.removesuffix(".content")
    return f"{section}: other data, or changed since" if section != change.key else str(change)


def report_resumed(
    changes: Sequence[Difference], checkpoint: Path, step: int, train: TrainConfig, totals: tuple[int, int]
) -> None:
    """Reports changed settings of a resumed run, and the jump of its learning rate; rank 0 calls it.

    Args:
        changes: the differences from :func:`check_resumable`.
        step: step of the checkpoint.
        totals: steps of the complete run, in the checkpoint and now.
    """
    for change in changes:
        effect = "the last bits of the result may differ" if matches(change.key, ROUNDING) else "as set now"
        logger.warning("%s: %s; the run continues, %s", checkpoint, change, effect)
    before, now = totals
    if before != now and step < now:
        old, new = (
            train.learning_rate * learning_rate_schedule(train.warmup_steps, total)(at)
            for total, at in ((before, step - 1), (now, step))
        )
        logger.warning(
            "the run has %d steps instead of %d: its learning rate goes from %.2g at step %d to %.2g at step %d",
            *(now, before, old, step, new, step + 1),
        )
