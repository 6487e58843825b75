"""What decides the result of a run: written into its checkpoints, compared when it resumes, and over its ranks.

The identity of a run is its resolved config with paths replaced by contents. A key of the config stops a resume
unless it is named here: :data:`NO_RESULT` changes nothing that is kept, :data:`CONTINUES` is what users change on
purpose to train on, and :data:`ROUNDING` changes the last bits alone. So does a new key, until someone decides.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dive_fast import numerics as precision
from dive_fast.config.schema import Config
from dive_fast.data.loaders.loader import loader_options
from dive_fast.data.prompts import TOKENIZER_PROBES, Template
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.engine.deepspeed_config import deepspeed_section
from dive_fast.engine.optimizer import learning_rate_schedule
from dive_fast.errors import ConfigError
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
    *("teacher.path", "train.output"),
)
"""Keys whose contents are compared instead, or which only say where something lies."""
PER_MACHINE = ("data.*.workers", "data.*.hw_decoder_load", "evaluate.workers")
NO_RESULT = (
    *LOCATIONS,
    *PER_MACHINE,
    *("teacher.batch_size", "teacher.audit", "teacher.tolerance", "teacher.verify"),
    *("train.log_every", "train.trace_steps", "train.checkpoint_every", "train.keep_last", "train.keep_best"),
    *("train.on_save_error", "train.resume", "train.nonfinite_limit", "train.rank_timeout"),
    *("evaluate.batch_size",),
    *("deepspeed.tensorboard", "deepspeed.wandb", "deepspeed.csv_monitor", "deepspeed.comet"),
    *("deepspeed.monitor_config", "deepspeed.flops_profiler", "deepspeed.comms_logger", "deepspeed.timers"),
    *("deepspeed.steps_per_print", "deepspeed.wall_clock_breakdown", "deepspeed.dump_state"),
    *("deepspeed.memory_breakdown", "deepspeed.train_batch_size", "deepspeed.gradient_accumulation_steps"),
    *("deepspeed.train_micro_batch_size_per_gpu",),
)
"""Keys that change no weight and no metric; never compared."""
RANKS_MAY_DIFFER = (
    *("model.name", "model.pretrained", "data.*.path", "data.*.image_root", "data.*.class_names"),
    *("data.*.templates", *PER_MACHINE),
)
"""Of a config's keys: those that may differ between ranks; the contents behind paths may not."""
CONTINUES = ("train.epochs", "train.max_steps", "evaluate.*")
"""Keys that users change on purpose to train on, or to choose among the weights otherwise; reported."""
ROUNDING = (
    *("data.*.loader", "data.*.decoder", "teacher.mode", "train.schedule", "train.micro_batch_size"),
    *("train.activation_checkpointing", "train.compile", "deepspeed.zero_optimization", "versions.*", "ranks"),
)
"""Keys that change the last bits of a result alone; reported."""


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted key, or a section around it, matches a pattern; ``*`` stands for one part or more."""
    parts = key.split(".")
    whole = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(part, pattern) for part in whole for pattern in patterns)


def resolved(config: Config, folder: Path, towers: Towers, ranks: Ranks) -> Config:
    """The config with its defaults filled in: what a run has really used, to be written down.

    Args:
        config: its schedule is chosen.
        towers: of the model, for the length of its texts.
    """
    data, objective, teacher, evaluate = config.data, config.objective, config.teacher, config.evaluate
    halves: dict[str, Any] = {}
    for half in ("target", "reference"):
        if (section := getattr(data, half)) is not None:
            length = section.text_length or towers.context_length
            root = section.image_root or (str(Path(section.path).parent) if section.format == "csv" else None)
            halves[half] = section.model_copy(update={"text_length": length, "image_root": root})
    objective, choice = registry.resolve(objective), registry.choose(objective)
    if objective.weight is None and choice.needs.reference:
        objective = objective.model_copy(update={"weight": choice.default_weight})
    if choice.needs.reference_teacher and teacher.mode == "cache":
        found = {"path": str(cache_folder(config, folder)), "tolerance": allowed(teacher.dtype, teacher.tolerance)}
        teacher = teacher.model_copy(update=found)
    if evaluate.during is None and (evaluate.every_steps or evaluate.every_epochs):
        evaluate = evaluate.model_copy(update={"during": list(evaluate.sets)})
    deepspeed = dict(config.deepspeed)
    if zero := deepspeed_section(config, ranks.world_size).get("zero_optimization"):
        deepspeed["zero_optimization"] = deepspeed["zero_optimization"] | {"stage": zero.get("stage", 0)}
    return config.model_copy(
        update={
            "data": data.model_copy(update=halves),
            "objective": objective,
            "teacher": teacher,
            "train": config.train.model_copy(update={"output": str(folder)}),
            "evaluate": evaluate,
            "deepspeed": deepspeed,
        }
    )


def of_config(config: Config, without: Sequence[str] = NO_RESULT) -> Identity:
    """The part of a run's identity that its config tells, keys of ``without`` left out."""

    def kept(tree: Mapping[str, Any], place: str) -> Identity:
        found = {}
        for key, value in tree.items():
            if not matches(f"{place}{key}", without):
                found[key] = kept(value, f"{place}{key}.") if isinstance(value, dict) else value
        return found

    return kept(config.model_dump(mode="json"), "")


def of_run(
    config: Config,
    model: Identity,
    target: Source,
    class_names: Sequence[str],
    templates: Sequence[Template],
    reference: Source | None,
    ranks: Ranks,
) -> Identity:
    """All that decides a run's result.

    Args:
        config: as :func:`resolved` returns it.
        model: of the pre-trained model, by :func:`dive_fast.model.model_identity.model_identity`.
        class_names: of the target set, in label order; empty where it has prompts and no classes.
        templates: that prompts are made of.
        reference: None where the objective has no reference batch.
    """
    found = of_config(config)
    found["objective"] = {key: value for key, value in found["objective"].items() if value is not None}
    tokens = tokenizer_of(config.model)(list(TOKENIZER_PROBES)).numpy().tobytes()
    found["model"] = model | {"tokenizer": hashlib.sha256(tokens).hexdigest()}
    half = found["data"]["target"]
    half["content"] = target.digest()
    if class_names:
        half["class_names"] = list(class_names)
        half["templates"] = [template("{}") for template in templates]
    half["decoder"] = decoder(loader_options(config, config.data.target, ranks))
    if reference is None:
        # It plays no part, and may be there or not.
        found["data"].pop("reference", None)
    elif config.data.reference is not None:
        half = found["data"]["reference"]
        half["content"] = reference.digest()
        half["decoder"] = decoder(loader_options(config, config.data.reference, ranks))
    return found | {"precision": precision.state(), "versions": versions(), "ranks": ranks.world_size}


def require_equal(ranks: Ranks, identity: Identity) -> None:
    """Validates that all ranks were started with the same; all ranks call it.

    Raises:
        ConfigError: names the first rank and key that differ, on every rank.
    """
    own = digest(identity)
    if len(set(ranks.collect(own))) == 1:
        return
    first, *others = ranks.collect(identity)
    for rank, other in enumerate(others, start=1):
        if found := differences(first, other):
            more = "" if len(found) == 1 else f" (and in {len(found) - 1} more: {', '.join(_keys(found[1:]))})"
            stored, current = found[0].shown()
            raise ConfigError(
                f"rank {rank} differs from rank 0 in {found[0].key}: {current}, not {stored}{more}; start all "
                "ranks with the same command, files and packages"
            )
    raise AssertionError("digests differ where identities do not")


def _keys(found: Sequence[Difference]) -> list[str]:
    return [difference.key for difference in found][:5]


def check_resumable(checkpoint: Path, stored: Identity, current: Identity) -> list[Difference]:
    """Compares the run of a checkpoint with the present one; returns the differences that a run continues with.

    Raises:
        ConfigError: the result would be neither run's; names every difference.
    """
    # Options that the method does not have decide nothing.
    objective = {key: value for key, value in stored["objective"].items() if key in current["objective"]}
    found = differences({**stored, "objective": objective}, current)
    refused = [one for one in found if not matches(one.key, (*CONTINUES, *ROUNDING))]
    if refused:
        listed = "; ".join(map(_described, refused))
        raise ConfigError(
            f"{checkpoint} belongs to a run with other settings ({listed}): set them back to continue that run, "
            "set train.output to another folder to keep both, or train.resume=never to train again here"
        )
    return found


def _described(one: Difference) -> str:
    """A difference in words: a digest of data says nothing to a user."""
    section = one.key.removesuffix(".content")
    return f"{section}: other data, or changed since" if section != one.key else str(one)


def report_resumed(
    found: Sequence[Difference], checkpoint: Path, step: int, config: Config, totals: tuple[int, int]
) -> None:
    """Reports what a run continues with, and what becomes of its learning rate; the first rank calls it.

    Args:
        found: as :func:`check_resumable` returns them.
        step: of the checkpoint.
        totals: steps of the whole run, as the checkpoint has it and at present.
    """
    for one in found:
        effect = "the last bits of the result may differ" if matches(one.key, ROUNDING) else "as set now"
        logger.warning("%s: %s; the run continues, %s", checkpoint, one, effect)
    before, now = totals
    if before != now and step < now:
        train = config.train
        old, new = (
            train.learning_rate * learning_rate_schedule(train.warmup_steps, total)(at)
            for total, at in ((before, step - 1), (now, step))
        )
        logger.warning(
            "the run has %d steps instead of %d: its learning rate goes from %.2g at step %d to %.2g at step %d",
            *(now, before, old, step, new, step + 1),
        )
