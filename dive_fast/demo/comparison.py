"""The demo's comparison: pre-trained, FLYP and DiVE by accuracy and geometry, as table, JSON and figure."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from dive_fast.config.schema import Config
from dive_fast.distributed import Ranks
from dive_fast.evaluation import plots
from dive_fast.evaluation.geometry.embed import describe_pairs, embed, open_pairs
from dive_fast.evaluation.geometry.measures import rsa
from dive_fast.evaluation.zero_shot import evaluate
from dive_fast.model.features import Pairs
from dive_fast.model.towers import create, tokenizer_of

EVIDENCE = """\
The demo shows that everything from config to exported model works, and that in a small generated world DiVE keeps
what FLYP forgets at the same steps and learning rate. Learning rate, lambda and epochs were chosen on these same
sets: the rate for FLYP's best ID; lambda is 0.1 here, where embeddings move further than CLIP's, whose lambda is
1000. The demo shows nothing about CLIP on natural images, nor about speed."""
"""The limits of the comparison; printed below the table."""

Report = dict[str, dict[str, float]]
MEASURES = {
    "id": "ID: the task, held-out pictures, %",
    "ood": "OOD: the task in other styles, %",
    "zs": "zero-shot: what tuning never mentions, %",
    "rsa": "RSA: geometry kept (1: unchanged)",
}


def compare(config: Config, models: dict[str, Path | None], heldout: str = "demo:reference_heldout") -> Report:
    """Measures models on the config's evaluation sets and on held-out pairs.

    Args:
        models: exported weights by name; the first must be None, the pre-trained model.
        heldout: webdataset of the pairs whose geometry is measured.

    Returns:
        For each name ``id``, ``ood``, ``zs`` (the mean over the sets named ``zs*``), ``rsa`` to the first model,
        and each zero-shot set by its name; accuracies are in [0, 1].
    """
    ranks = Ranks(0, 1, torch.device("cpu"))
    tokenizer = tokenizer_of(config.model)
    report: Report = {}
    before: Pairs | None = None
    heldout_pairs = describe_pairs(None, heldout, "webdataset")
    for name, weights in models.items():
        towers = create(config.model).eval()
        if weights is not None:
            towers.load_exported(load_file(weights))
        accuracies = evaluate(towers, tokenizer, config.evaluate, ranks)
        embeddings = embed(towers, open_pairs(config.model, heldout_pairs, towers), ranks, 256)
        before = embeddings if before is None else before
        zero_shot = {key: value for key, value in accuracies.items() if key.startswith("zs")}
        report[name] = {
            "id": accuracies["id"],
            "ood": accuracies["ood"],
            "zs": sum(zero_shot.values()) / len(zero_shot),
            "rsa": rsa(torch.cat(before), torch.cat(embeddings)),
            **zero_shot,
        }
    return report


def table(report: Report) -> str:
    """The report as lines of text: accuracies in percent."""
    columns = list(next(iter(report.values())))
    rows = [["", *columns]]
    for name, values in report.items():
        cells = [f"{v:.3f}" if column == "rsa" else f"{100 * v:.1f}" for column, v in values.items()]
        rows.append([_style(name)[0], *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(report: Report, path: Path) -> None:
    """Draws the report as a PNG: a panel for each measure, a bar for each model with its change from the first."""
    figure = plots.new_figure(plots.WIDTH, 4.3)
    names = list(report)
    labels = [_style(name)[0] for name in names]
    for axis, (measure, title) in zip(figure.subplots(2, 2, sharey=True).flat, MEASURES.items(), strict=True):
        factor, digits = (1.0, 3) if measure == "rsa" else (100.0, 1)
        values = [factor * report[name][measure] for name in names]
        axis.axvline(values[0], color=plots.GREY, linewidth=1, linestyle="--", zorder=0)
        for row, (name, value) in enumerate(zip(names, values, strict=True)):
            axis.barh(row, value, height=0.66, color=_style(name)[1])
            change = f"  ({value - values[0]:+.{digits}f})" if row else ""
            axis.annotate(
                f"{value:.{digits}f}{change}",
                *((value, row), (5, 0)),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, 1.5 * max(values))
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.axes[0].set_yticks(range(len(names)), labels, fontsize=10)
    figure.axes[0].invert_yaxis()
    plots.add_title(figure, message(report))
    plots.save_figure(figure, path)


def message(report: Report) -> str:
    """The title of the figure: the zero-shot accuracy of each model."""
    first, *tuned = ((_style(name)[0], 100 * values["zs"]) for name, values in report.items())
    after = ", ".join(f"{value:.0f} % after {name}" for name, value in tuned)
    return f"Demo: zero-shot accuracy is {first[1]:.0f} % before tuning, {after}"


def _style(name: str) -> tuple[str, str]:
    """Name and colour of a model in tables and figures."""
    return plots.method_styles().get(name, (name, "#3d3d3d"))


def write(report: Report, folder: Path) -> None:
    """Writes ``report.json`` and ``report.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, folder / "report.png")
