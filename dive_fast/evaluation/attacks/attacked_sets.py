"""Accuracy under attack of one model on many sets: a row for each set and distance; complete rows are reused."""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from dive_fast.config.schema import EvaluateConfig, EvaluationSet
from dive_fast.data.loaders.loader import Options as LoaderOptions
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import UserError, warn_on_main_rank
from dive_fast.evaluation.attacks.attack_options import (
    MAX_BATCH,
    SMALL_EPS,
    AttackOptions,
    attackable,
    check_installed,
)
from dive_fast.evaluation.attacks.auto_attack import num_targets
from dive_fast.evaluation.attacks.block_log import BlockLog
from dive_fast.evaluation.attacks.robust_accuracy import STEP_SHARE, UnderAttack, chosen_samples, robust_accuracy
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.resolve import Opened, open_sets
from dive_fast.evaluation.datasets.set_loader import loader_of
from dive_fast.evaluation.evaluator import Options, describe_set, shared_identities, stored_or_measured
from dive_fast.evaluation.results import Results
from dive_fast.evaluation.tables import ADVERSARIAL, Row, attack_name
from dive_fast.evaluation.zero_shot import classifier_for
from dive_fast.identity import Identity, digest
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers

FOLDER = "attacks"
"""Folder of unfinished measurements in a results folder."""
NEEDED = ("value", "clean", "not_finite", "left_out")
"""Fields that a stored row must have to be used."""


def attack_all(
    towers: Towers,
    tokenizer: Tokenizer,
    sets: Mapping[str, EvaluationSet],
    opened: Opened,
    ranks: Ranks,
    results: Results,
    options: Options,
    attack: AttackOptions,
    model_fields: Row,
    head: Head | None = None,
) -> list[Row]:
    """Attacks each labelled set and adds its rows to the results; all ranks must call this, and all get the rows.

    Args:
        options: those of an evaluation; the batch size is the number of images attacked at once on each rank.
        model_fields: fields of a row that describe the model.

    Raises:
        ConfigError, DataError: invalid config or data; the message says what to change. Earlier rows remain.
    """
    labelled = attackable(opened, attack.name)
    for name in opened.keys() - labelled.keys():
        ranks.print(f"{name}: left out: it has no labels to attack")
    if towers.autocast is not None:
        warn_on_main_rank(
            f"the attack computes in {options.precision}: rounding hides gradients, so that a model may look more "
            "robust than it is; --precision fp32 does not"
        )
    for eps in attack.eps:
        if 0 < eps < SMALL_EPS:
            warn_on_main_rank(
                f"eps = {eps:g} is {eps:g}/255, since distances are in 255ths; {255 * eps:.3g}/255 is {eps:g}"
            )
    identity_of = shared_identities(towers, tokenizer, dict(labelled), ranks, options, head)
    rows: list[Row] = []
    for name, data in labelled.items():
        by_prompts = "prompts" if towers.prompts is None else "learned prompts"
        fields = describe_set(name, sets[name], data, head, by_prompts) | {"metric": ADVERSARIAL}
        for eps in attack.eps:
            described = attack_fields(attack, eps, len(data.source))
            identity = identity_of[name] | {"attack": attack_identity(attack, eps, data, options.batch_size)}
            log = _log(results, digest(identity))

            def scores(name: str = name, data: Labelled = data, eps: float = eps, log: BlockLog = log) -> Row:
                measured = _measure(*(towers, tokenizer, data, ranks, options, attack, eps, name, head, log))
                row: Row = {"value": measured.robust, "clean": measured.clean, "samples": measured.samples}
                return row | {"left_out": measured.left_out, "not_finite": measured.not_finite}

            rows.append(
                stored_or_measured(
                    *(name, ranks, results, options, model_fields, fields, identity, NEEDED, scores, _summary),
                    attack=described,
                )
            )
            with ranks.raise_on_all(UserError):
                if ranks.is_main:
                    log.remove()
    return rows


def evaluate_under_attack(
    towers: Towers, tokenizer: Tokenizer, config: EvaluateConfig, ranks: Ranks, attack: AttackOptions
) -> dict[str, dict[float, float]]:
    """Opens and attacks the config's labelled sets; returns the accuracy of each by name and eps, in [0, 1].

    Nothing is stored. The batch size is at most :data:`MAX_BATCH`.

    Raises:
        ConfigError, DataError: invalid config or data; the message says what to change.
    """
    check_installed(attack.name)
    labelled = attackable(open_sets(config.sets, ranks), attack.name)
    options = Options("", "", min(config.batch_size, MAX_BATCH), config.workers, config.loader)
    return {
        name: {
            eps: _measure(*(towers, tokenizer, data, ranks, options, attack, eps, name)).robust
            for eps in attack.eps
        }
        for name, data in labelled.items()
    }


def attack_fields(attack: AttackOptions, eps: float, count: int) -> dict[str, Any]:
    """The fields of a row that describe the attack.

    Args:
        eps: distance in 255ths.
        count: number of samples of the set.
    """
    is_subset = attack.samples is not None and attack.samples < count
    return {
        "attack": attack.name,
        "norm": attack.norm,
        "eps": eps,
        "steps": attack.num_steps,
        "subset": attack.samples if is_subset else None,
        "seed": attack.seed,
    }


def attack_identity(attack: AttackOptions, eps: float, data: Labelled, batch_size: int) -> Identity:
    """The part of a row's identity that comes from the attack.

    AutoAttack draws random numbers for a batch, so its batch size is a part; for the other attacks it changes
    only rounding.
    """
    identity: Identity = attack_fields(attack, eps, len(data.source))
    if identity["subset"] is not None:
        identity["samples"] = digest(chosen_samples(len(data.source), attack))
    if attack.name == "pgd":
        identity["step_share"] = STEP_SHARE
    if attack.name == "autoattack":
        identity["batch_size"] = batch_size
        identity["targets"] = num_targets(data.num_labels)
        identity["pyautoattack"] = metadata.version("pyautoattack")
    return identity


def _measure(
    towers: Towers,
    tokenizer: Tokenizer,
    data: Labelled,
    ranks: Ranks,
    options: Options,
    attack: AttackOptions,
    eps: float,
    name: str,
    head: Head | None = None,
    log: BlockLog | None = None,
) -> UnderAttack:
    """Accuracy of a set under the attack at one distance.

    Args:
        log: outcomes of an interrupted measurement; ``options.force`` removes them.
    """
    with ranks.raise_on_all(UserError):
        if log is not None and options.force and ranks.is_main:
            log.remove()
    classes = classifier_for(towers, tokenizer, data, ranks, head, options.classifiers)
    return robust_accuracy(
        *(towers, classes, data, ranks, attack, eps),
        batch_size=options.batch_size,
        loader=LoaderOptions(
            loader_of(options.loader, data, towers.preprocess).name, options.workers, ranks.device
        ),
        log=log,
        name=f"{name}, {eps:g}/255",
    )


def _log(results: Results, key: str) -> BlockLog:
    return BlockLog(results.folder / FOLDER / f"{key[:32]}.jsonl")


def _summary(row: Row) -> str:
    text = f"{100 * row['value']:.2f} % of {row['samples']} samples under {attack_name(row)}, {row['eps']:g}/255"
    text += f"; {100 * row['clean']:.2f} % clean"
    if row["not_finite"]:
        text += f"; {row['not_finite']} with gradients that are not finite count as not robust"
    if row["left_out"]:
        text += f"; {row['left_out']} left out"
    return text
