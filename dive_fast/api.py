"""The commands' functions for Python: read a config, train, evaluate, compare.

Under a launcher (``torchrun script.py``) every rank calls them; otherwise they use one GPU, or the CPU.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dive_fast.distributed import Ranks, join, use_cpu_without_gpu

# Before the imports below, which import DeepSpeed.
use_cpu_without_gpu()

from dive_fast.config.schema import EvaluateConfig, EvaluationSet, ModelConfig
from dive_fast.config.shipped import CONFIGS
from dive_fast.evaluation import zero_shot
from dive_fast.evaluation.attacks.attack_options import AttackOptions
from dive_fast.evaluation.attacks.attacked_sets import evaluate_under_attack
from dive_fast.evaluation.early_checks import find_prompts
from dive_fast.evaluation.geometry import compare as geometry
from dive_fast.evaluation.geometry.embed import describe_pairs
from dive_fast.methods.run_config import RunConfig as Config
from dive_fast.methods.run_config import load_run_config
from dive_fast.model import prompt_file, towers
from dive_fast.model.model_names import named
from dive_fast.training import loop

__all__ = ["Config", "compare", "evaluate", "load", "train"]


def load(name: str | Path, *overrides: str) -> Config:
    """Reads a config by path, or by its name among the shipped ones (``"vitb16_dive"``).

    Args:
        overrides: ``section.key=value``, as on the command line.

    Raises:
        ConfigError: no such file, or an invalid config; names the key and its file.
    """
    return load_run_config(str(name), overrides, CONFIGS)


def train(config: Config, output: str | Path | None = None) -> dict[str, float]:
    """Fine-tunes a model, or resumes the run in ``output``; returns the final metrics.

    The run folder then has the model, its report and its metrics, as after ``dive-fast train``.

    Args:
        output: run folder; default: ``train.output`` of the config.

    Raises:
        ValueError: neither names a run folder.
        ConfigError, DataError: invalid config or data; the message says what to change.
        Stopped: a signal asked the run to stop; it is saved, and the same call resumes it.
    """
    folder = output or config.train.output
    if folder is None:
        raise ValueError("name a run folder: train(config, output), or train.output in the config")
    return loop.train(config, Path(folder), _ranks(config.train.rank_timeout))


def evaluate(
    model: str | Path | ModelConfig,
    sets: Mapping[str, EvaluationSet | Mapping[str, Any]],
    attack: Mapping[str, Any] | None = None,
    prompts: str | Path | None = None,
    **options: Any,
) -> dict[str, float]:
    """Measures a model on data sets; returns each set's metric, in [0, 1], by name.

    Args:
        model: a run folder, a folder of transformers, a name that brings its weights (``hf:``, ``hf-hub:``,
            ``local-dir:``), or a ``model`` section, e.g.
            ``ModelConfig(name="ViT-B-16-quickgelu", pretrained="openai")``.
        sets: name -> data set, as ``evaluate.sets`` of a config.
        attack: measures the accuracy under this attack instead, on sets with labels:
            ``{"name": "apgd-ce", "eps": 4}``, with eps in 255ths, and optionally ``norm``, ``steps``, ``samples``
            and ``seed`` (:class:`dive_fast.evaluation.attacks.attack_options.AttackOptions`).
        prompts: learned prompts that classify instead of hand-made ones: a ``prompts.safetensors``, or the run
            folder with it, also of a run with another model that they fit (docs/prompts.md).
        options: other keys of the section ``evaluate``: ``batch_size``, ``workers``.

    Raises:
        ConfigError, DataError: the model, the prompts or a set cannot be read, the prompts do not fit the model,
            or the attack is not possible.
        TypeError: an unknown key of the attack.
        ValidationError: an unknown key.
    """
    attacking = (
        None if attack is None else AttackOptions(**{**attack, "eps": (float(attack.get("eps", math.nan)),)})
    )
    described = _model(model)
    prompt_path = None if prompts is None else find_prompts(Path(prompts), "prompts")
    config = EvaluateConfig.model_validate(
        {"sets": {name: _section(each) for name, each in sets.items()}} | options
    )
    ranks = _ranks()
    evaluated, tokenizer = towers.create(described).to(ranks.device).eval(), towers.tokenizer_of(described)
    if prompt_path is not None:
        prompt_file.attach(prompt_file.load(prompt_path), prompt_path, evaluated, tokenizer)
    if attacking is not None:
        measured = evaluate_under_attack(evaluated, tokenizer, config, ranks, attacking)
        return {name: by_eps[attacking.eps[0]] for name, by_eps in measured.items()}
    with torch.no_grad():
        return zero_shot.evaluate(evaluated, tokenizer, config, ranks)


def compare(
    before: str | Path | ModelConfig, after: str | Path, pairs: str | Path, limit: int | None = 2000
) -> dict[str, Any]:
    """Compares the geometry of a model's embeddings before and after fine-tuning: RSA, CKA, difference vectors.

    Args:
        before: the pre-trained model, as for :func:`evaluate`.
        after: a run folder, or its weights.
        pairs: captioned tars, CSV file or prepared set, preferably not trained on.
        limit: number of pairs, spread evenly over the set; None: all.

    Returns:
        The report that ``dive-fast geometry`` writes; its measures are in ``"metrics"``.

    Raises:
        ConfigError, DataError: a model or the pairs cannot be read.
    """
    weights = Path(after)
    weights = weights / "model.safetensors" if weights.is_dir() else weights
    described = _model(before)
    data = describe_pairs(None, str(pairs))
    embedded = geometry.embed_both(described, EvaluateConfig(), None, weights, data, _ranks(), limit, "pairs")
    labels = {"model": described.name, "before": geometry.PRETRAINED, "after": str(weights), "pairs": str(pairs)}
    return geometry.measure(embedded, labels)


def _ranks(timeout: float | None = None) -> Ranks:
    return join() if timeout is None else join(timeout)


def _model(model: str | Path | ModelConfig) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    return named(str(model))


def _section(evaluation: EvaluationSet | Mapping[str, Any]) -> dict[str, Any]:
    return evaluation.model_dump() if isinstance(evaluation, EvaluationSet) else dict(evaluation)
