"""Weight ensembles: models on the line between the pre-trained weights and the fine-tuned ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.checkpoint.load_weights import exported, head_of
from dive_fast.config.schema import Config
from dive_fast.data.prompts import Template, Tokenizer, read_templates
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, UserError, nearest
from dive_fast.evaluate import plots
from dive_fast.evaluate.classifier import classifier
from dive_fast.evaluate.datasets.resolve import metric_of, open_sets
from dive_fast.evaluate.results import LOCK
from dive_fast.evaluate.zero_shot import Measured, measure_sets, report_left_out, values
from dive_fast.io.atomic_files import write_atomic
from dive_fast.locks import file_lock
from dive_fast.model import head as heads
from dive_fast.model import towers
from dive_fast.model.head import Head
from dive_fast.model.model_files import DESCRIPTION

WEIGHTS = "ensemble.safetensors"
ALPHAS = tuple(step / 10 for step in range(1, 10))
State = dict[str, Tensor]


class Ensemble(NamedTuple):
    """The best mixture, and what all were worth."""

    report: dict[str, Any]
    """``alpha``, the best one on ``chosen_on``, the smaller where two are equal; ``accuracies``, a row for each
    alpha, 0 and 1 included: shares in [0, 1] by set, of its ``metrics``; ``left_out``: samples that could not be
    read, by set."""
    weights: State
    """Under open_clip's names."""
    head: Head | None
    """Where the run has trained one."""
    model: towers.Towers
    """Says how images are preprocessed."""


def interpolate(pretrained: State, tuned: State, alpha: float) -> State:
    """``(1 - alpha) * pretrained + alpha * tuned``, bit for bit the one at 0 and the other at 1.

    Args:
        pretrained, tuned: weights under the same names; what is no floating-point number is taken from ``tuned``.
    """
    return {
        name: torch.lerp(pretrained[name].float(), after.float(), alpha) if after.is_floating_point() else after
        for name, after in tuned.items()
    }


def ensemble(
    config: Config,
    weights: Path,
    ranks: Ranks,
    *,
    chosen_on: str | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> Ensemble:
    """Measures ensembles and both their ends on the config's evaluation sets; all ranks call it.

    A head that was trained with the weights is mixed with the one that class prompts make.

    Args:
        weights: a checkpoint as :func:`dive_fast.checkpoint.load_weights.load_into` takes it.
        chosen_on: the evaluation set of ID validation; default: the first.

    Raises:
        ConfigError: there is no evaluation set, none of that name, or the weights are not those of the model.
        DataError: a set cannot be opened or measured.
    """
    names = list(config.evaluate.sets)
    if not names:
        raise ConfigError("evaluate.sets: alpha is chosen on one of them; name the ID validation set")
    chosen_on = chosen_on or names[0]
    if chosen_on not in names:
        raise ConfigError(
            f"evaluate.sets has no {chosen_on}{nearest(chosen_on, names)}; it has {', '.join(names)}"
        )
    with ranks.raise_on_all(UserError):
        # What a typo may be in comes before what takes minutes.
        opened = open_sets(config.evaluate.sets, ranks)
        trained = head_of(weights)
        templates = () if trained is None else read_templates(config.data.target.templates)
        model = towers.create(config.model)
        tokenizer = towers.tokenizer_of(config.model)
        pretrained = {name: tensor.clone() for name, tensor in model.export(model.state_dict()).items()}
        tuned = exported(model, config.model, weights)
    model = model.to(ranks.device).eval()
    start = None
    if trained is not None:
        # In fp32, as at the start of training. 80,000 prompts take a CPU many minutes: the device, and all ranks.
        start = _of_prompts(model.load_exported(pretrained), tokenizer, trained.class_names, templates, ranks)
    model.set_precision(config.train.precision)
    points = sorted({0.0, *alphas, 1.0})
    rows: list[dict[str, float]] = []
    measured: dict[str, Measured] = {}
    with ranks.progress(len(points), "ensembles", "model") as bar:
        for alpha in points:
            model.load_exported(interpolate(pretrained, tuned, alpha))
            head = _mixed(start, trained, alpha)
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
        "left_out": {name: found.left_out for name, found in measured.items() if found.left_out},
        "accuracies": rows,
    }
    return Ensemble(report, interpolate(pretrained, tuned, best), _mixed(start, trained, best), model)


def _of_prompts(
    model: towers.Towers,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[Template],
    ranks: Ranks,
) -> Head:
    """The head that the target's prompts make, on the CPU: what :mod:`dive_fast.train.linear_probe` starts from."""
    unit = classifier(model, tokenizer, names, templates, ranks)
    return Head((unit * model.scale().detach()).cpu(), torch.zeros(len(names)), tuple(names))


def _mixed(start: Head | None, trained: Head | None, alpha: float) -> Head | None:
    if start is None or trained is None:
        return None
    first, last = ({"weight": head.weight, "bias": head.bias} for head in (start, trained))
    mixed = interpolate(first, last, alpha)
    return Head(mixed["weight"], mixed["bias"], trained.class_names)


def write(found: Ensemble, folder: Path) -> None:
    """Leaves :data:`WEIGHTS`, for open_clip to load, any mixed head, ``ensemble.json`` and its picture."""
    with file_lock(folder / LOCK, f"results folder {folder}", wait=True):
        towers.save(found.weights, folder / WEIGHTS)
        if not (folder / DESCRIPTION).exists():
            towers.describe(found.model, folder)
        path = heads.path_beside(folder / WEIGHTS)
        if found.head is None:
            path.unlink(missing_ok=True)  # another ensemble's: it would classify in the place of prompts
        else:
            heads.save(found.head, path)
        write_atomic(folder / "ensemble.json", (json.dumps(found.report, indent=2) + "\n").encode())
        plots.ensemble(found.report, folder / "ensemble.png")


def table(report: dict[str, Any]) -> str:
    """Figures in percent, a line for each alpha; a set's metric stands by its name where it is not top-1."""
    names = [name for name in report["accuracies"][0] if name != "alpha"]
    metrics = report.get("metrics", {})
    shown = {name: name if metrics.get(name, "top1") == "top1" else f"{name} ({metrics[name]})" for name in names}
    lines = ["alpha  " + "  ".join(shown.values())]
    for row in report["accuracies"]:
        cells = "  ".join(f"{100 * row[name]:{len(shown[name])}.1f}" for name in names)
        lines.append(f"{row['alpha']:5.2f}  {cells}" + ("  <" if row["alpha"] == report["alpha"] else ""))
    return "\n".join(lines)
