"""Weight ensembles: models on the line between the pre-trained weights and the fine-tuned ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dive_fast import towers
from dive_fast.config import Config, ConfigError
from dive_fast.engine import AUTOCAST
from dive_fast.evaluate import plots
from dive_fast.evaluate.zero_shot import evaluate
from dive_fast.files import write_whole
from dive_fast.ranks import Ranks

ALPHAS = tuple(step / 10 for step in range(1, 10))
State = dict[str, Tensor]


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
) -> tuple[dict[str, Any], State]:
    """Measures ensembles and both their ends on the config's evaluation sets; all ranks call it.

    Args:
        weights: a run's ``model.safetensors``.
        chosen_on: the evaluation set of ID validation; default: the first.

    Returns:
        The report: ``alpha``, the best one on that set, the smaller where two are equal; ``chosen_on``;
        ``accuracies``, shares in [0, 1] by set for each alpha, 0 and 1 included. And the weights at ``alpha``.

    Raises:
        ConfigError: there is no evaluation set, none of that name, or the weights are not those of the model.
    """
    names = list(config.evaluate.sets)
    if not names:
        raise ConfigError("evaluate.sets: alpha is chosen on one of them; name the ID validation set")
    chosen_on = chosen_on or names[0]
    if chosen_on not in names:
        raise ConfigError(f"evaluate.sets has no {chosen_on}; it has {', '.join(names)}")
    model = towers.create(config.model)
    pretrained, tuned = model.export(model.state_dict()), load_weights(weights)
    pretrained = {name: tensor.clone() for name, tensor in pretrained.items()}
    if shapes(pretrained) != shapes(tuned):
        raise ConfigError(f"{weights}: not the weights of {config.model.name}")
    tokenizer = towers.tokenizer_of(config.model)
    model = model.to(ranks.device).eval()
    model.autocast = AUTOCAST[config.train.precision]
    points = sorted({0.0, *alphas, 1.0})
    rows = []
    with ranks.progress(len(points), "ensembles", "model") as bar:
        for alpha in points:
            model.load_exported(interpolate(pretrained, tuned, alpha))
            rows.append({"alpha": alpha} | evaluate(model, tokenizer, config.evaluate, ranks))
            bar.update()
    inner = [row for row in rows if row["alpha"] in alphas]
    best = max(inner, key=lambda row: (row[chosen_on], -row["alpha"]))["alpha"]
    report = {"alpha": best, "chosen_on": chosen_on, "accuracies": rows}
    return report, interpolate(pretrained, tuned, best)


def shapes(state: State) -> dict[str, torch.Size]:
    """By name."""
    return {name: tensor.shape for name, tensor in state.items()}


def write(report: dict[str, Any], state: State, folder: Path) -> None:
    """Leaves ``ensemble.safetensors``, which open_clip loads, ``ensemble.json`` and its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    towers.save(state, folder / "ensemble.safetensors")
    write_whole(folder / "ensemble.json", (json.dumps(report, indent=2) + "\n").encode())
    plots.ensemble(report, folder / "ensemble.png")


def table(report: dict[str, Any]) -> str:
    """Accuracies in percent, a line for each alpha."""
    names = [name for name in report["accuracies"][0] if name != "alpha"]
    lines = ["alpha  " + "  ".join(names)]
    for row in report["accuracies"]:
        cells = "  ".join(f"{100 * row[name]:{len(name)}.1f}" for name in names)
        lines.append(f"{row['alpha']:5.2f}  {cells}" + ("  <" if row["alpha"] == report["alpha"] else ""))
    return "\n".join(lines)


def load_weights(weights: Path) -> State:
    """A model's weights as open_clip has them.

    Raises:
        ConfigError: no such file, or none of weights.
    """
    try:
        return load_file(weights)
    except Exception as error:  # safetensors has an error of its own for each way to be broken
        raise ConfigError(f"{weights}: cannot be read as safetensors: {error}") from error
