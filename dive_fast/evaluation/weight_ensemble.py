"""Weight ensembles: interpolations between the pre-trained and the fine-tuned weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.checkpoint.load_weights import exported, head_of
from dive_fast.config.schema import Config
from dive_fast.data.prompt_files import Template, read_templates
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, UserError, nearest
from dive_fast.evaluation import plots
from dive_fast.evaluation.classifier import classifier
from dive_fast.evaluation.datasets.resolve import metric_of, open_sets
from dive_fast.evaluation.datasets.set_loader import remark_on_loaders
from dive_fast.evaluation.results import LOCK
from dive_fast.evaluation.text_features import KeptTokens
from dive_fast.evaluation.zero_shot import Measured, measure_sets, report_left_out, values
from dive_fast.io.atomic_files import write_atomic
from dive_fast.locks import file_lock
from dive_fast.model import head as heads
from dive_fast.model import towers
from dive_fast.model.head import Head
from dive_fast.model.model_names import DESCRIPTION

WEIGHTS = "ensemble.safetensors"
ALPHAS = tuple(step / 10 for step in range(1, 10))
State = dict[str, Tensor]


class Ensemble(NamedTuple):
    """The best ensemble, and a report on all of them."""

    report: dict[str, Any]
    """``alpha``: the best one on ``chosen_on``, the smallest of equally good ones; ``accuracies``: a row for each
    alpha, 0 and 1 included, with each set's metric (``metrics``) in [0, 1]; ``samples`` measured and
    ``left_out`` (unreadable) of each set."""
    weights: State
    """Weights under open_clip's names."""
    head: Head | None
    """The interpolated head, if the run has trained one."""
    model: towers.Towers
    """The model; its preprocessing is written next to the weights."""


def interpolate(pretrained: State, tuned: State, alpha: float) -> State:
    """``(1 - alpha) * pretrained + alpha * tuned``; bit-identical to the inputs at alpha 0 and 1.

    Args:
        pretrained, tuned: weights under the same names; tensors of integers are taken from ``tuned``.
    """
    return {
        name: torch.lerp(pretrained[name].float(), value.float(), alpha) if value.is_floating_point() else value
        for name, value in tuned.items()
    }


def ensemble(
    config: Config,
    weights: Path,
    ranks: Ranks,
    *,
    chosen_on: str | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> Ensemble:
    """Measures ensembles and both endpoints on the config's evaluation sets; all ranks must call this.

    A head that was trained with the weights is interpolated with the head made from class prompts.

    Args:
        weights: a checkpoint that :func:`dive_fast.checkpoint.load_weights.load_into` accepts.
        chosen_on: evaluation set on which alpha is chosen (ID validation); default: the first.

    Raises:
        ConfigError: there is no evaluation set, none of that name, or the weights do not fit the model.
        DataError: a set cannot be opened or measured.
    """
    names = list(config.evaluate.sets)
    if not names:
        raise ConfigError("evaluate.sets: there is no set to choose alpha on; name the ID validation set")
    chosen_on = chosen_on or names[0]
    if chosen_on not in names:
        raise ConfigError(
            f"evaluate.sets has no {chosen_on}{nearest(chosen_on, names)}; it has {', '.join(names)}"
        )
    # Steps that fail on a typo come before those that take minutes.
    opened = open_sets(config.evaluate.sets, ranks)
    with ranks.raise_on_all(UserError):
        trained = head_of(weights)
        templates = (
            () if trained is None else read_templates(config.data.target.templates, "data.target.templates")
        )
        model = towers.create(config.model)
        tokenizer = KeptTokens(towers.tokenizer_of(config.model))
        pretrained = {name: tensor.clone() for name, tensor in model.export(model.state_dict()).items()}
        tuned = exported(model, config.model, weights)
    # Interpolated there for each alpha.
    pretrained, tuned = _on_device(pretrained, ranks), _on_device(tuned, ranks)
    model = model.to(ranks.device).eval()
    remark_on_loaders(config.evaluate.loader, opened, model.preprocess, ranks)
    start = None
    if trained is not None:
        # In fp32, as at the start of training; on the device and on all ranks, since there may be 80,000 prompts.
        start = head_of_prompts(model.load_exported(pretrained), tokenizer, trained.class_names, templates, ranks)
    model.set_precision(config.train.precision)
    points = sorted({0.0, *alphas, 1.0})
    rows: list[dict[str, float]] = []
    measured: dict[str, Measured] = {}
    with ranks.progress(len(points), "ensembles", "model") as bar:
        for alpha in points:
            model.load_exported(interpolate(pretrained, tuned, alpha))
            head = interpolate_heads(start, trained, alpha)
            measured = measure_sets(model, tokenizer, config.evaluate, opened, ranks, head)
            rows.append({"alpha": alpha} | values(measured, config.evaluate.sets))
            bar.update()
    report_left_out(measured, ranks)
    inner = [row for row in rows if row["alpha"] in alphas]
    best = max(inner, key=lambda row: (row[chosen_on], -row["alpha"]))["alpha"]
    report = {
        "alpha": best,
        "chosen_on": chosen_on,
        "metrics": {name: metric_of(evaluation) for name, evaluation in config.evaluate.sets.items()},
        "samples": {name: result.samples for name, result in measured.items()},
        "left_out": {name: result.left_out for name, result in measured.items() if result.left_out},
        "accuracies": rows,
    }
    head = interpolate_heads(start, trained, best)
    weights_of_best = {name: tensor.cpu() for name, tensor in interpolate(pretrained, tuned, best).items()}
    return Ensemble(report, weights_of_best, head, model)


def _on_device(state: State, ranks: Ranks) -> State:
    return {name: tensor.to(ranks.device) for name, tensor in state.items()}


def head_of_prompts(
    model: towers.Towers,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[Template],
    ranks: Ranks,
) -> Head:
    """The head made from the target's prompts, on the CPU: the start of :mod:`dive_fast.training.linear_probe`."""
    rows = classifier(model, tokenizer, names, templates, ranks)
    return Head((rows * model.scale().detach()).cpu(), torch.zeros(len(names)), tuple(names))


def interpolate_heads(start: Head | None, trained: Head | None, alpha: float) -> Head | None:
    """The head between two heads of the same classes; None without one of them."""
    if start is None or trained is None:
        return None
    first, last = ({"weight": head.weight, "bias": head.bias} for head in (start, trained))
    state = interpolate(first, last, alpha)
    return Head(state["weight"], state["bias"], trained.class_names)


def write(result: Ensemble, folder: Path) -> None:
    """Writes :data:`WEIGHTS` for open_clip, the head if there is one, ``ensemble.json`` and its figure."""
    with file_lock(folder / LOCK, f"results folder {folder}", wait=True):
        write_weights(result.weights, result.head, result.model, folder / WEIGHTS)
        write_atomic(folder / "ensemble.json", (json.dumps(result.report, indent=2) + "\n").encode())
        plots.ensemble(result.report, folder / "ensemble.png")


def write_weights(weights: State, head: Head | None, model: towers.Towers, path: Path) -> None:
    """Writes weights for open_clip, the head next to them, and a description of the model if there is none yet.

    Args:
        weights: under open_clip's names.
        head: None removes that of earlier weights of this name, which would be used instead of prompts.
    """
    towers.save(weights, path)
    if not (path.parent / DESCRIPTION).exists():
        towers.save_description(model, path.parent)
    if head is None:
        heads.head_path(path).unlink(missing_ok=True)
    else:
        heads.save(head, heads.head_path(path))


def table(report: dict[str, Any]) -> str:
    """The report as lines of text: percentages for each alpha, with the best one marked."""
    names = [name for name in report["accuracies"][0] if name != "alpha"]
    metrics = report.get("metrics", {})
    titles = {name: name if metrics.get(name, "top1") == "top1" else f"{name} ({metrics[name]})" for name in names}
    lines = ["alpha  " + "  ".join(titles.values())]
    for row in report["accuracies"]:
        cells = "  ".join(f"{100 * row[name]:{len(titles[name])}.1f}" for name in names)
        lines.append(f"{row['alpha']:5.2f}  {cells}" + ("  <" if row["alpha"] == report["alpha"] else ""))
    return "\n".join(lines)
