"""The table of methods in docs/methods.md: ``python benchmarks/method_table.py``.

Names, needs and configs are the registry's and the shipped configs', published numbers those of
``dive_fast/evaluation/published.tsv``. ``--plan`` plans FLOP and memory of a step of each method again, on fake
tensors, and writes results/method_costs.json.
"""

import argparse
import json
import os
import warnings
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")

from loss_report import REPOSITORY, commit, write_json  # noqa: E402

from dive_fast.config.schema import NO_PROJECTION  # noqa: E402
from dive_fast.evaluation import published  # noqa: E402
from dive_fast.methods import registry  # noqa: E402
from dive_fast.methods.method import Needs, Preset, needs_of  # noqa: E402
from dive_fast.methods.run_config import load_run_config  # noqa: E402
from dive_fast.planner.simulate import plan_run  # noqa: E402

CONFIGS = REPOSITORY / "launch/configs"
COSTS = REPOSITORY / "benchmarks/results/method_costs.json"
DOCUMENT = REPOSITORY / "docs/methods.md"
BEGIN, END = "<!-- benchmarks/method_table.py writes this table -->\n", "<!-- end of the table -->\n"
BASE = "vitb16_dive.json"
LENGTHS = ("data.target.text_length=16", "data.reference.text_length=32")
ADAPTERS = ("model.lora.rank=64", 'model.lora.towers=["image"]')
"""Overrides for methods that train adapters."""
BASELINE = "flyp"
# Rows of published.tsv, by preset; FLYP is in two tables, whose ObjectNet protocols differ.
PUBLISHED = {
    "flyp": ("FLYP, DiVE's reproduction", "FLYP, TRACER's table"),
    "vanilla_ft": ("Vanilla FT",),
    "lp_ft": ("LP-FT",),
    "flyp_replay": ("FLYP + replay",),
    "snd": ("SnD, DiVE's reproduction",),
    "dive": ("DiVE",),
    "tracer": ("TRACER",),
    "tracer_fd": ("TRACER, FD only",),
    "carot": ("CaRot",),
    "lipsum": ("Lipsum-FT",),
    "car_ft": ("CAR-FT",),
}
AVERAGES = ("ood4", "ood5", "zs10")
SHORT_SOURCES = {"DiVE (arXiv 2511.09973)": "DiVE", "TRACER (arXiv 2605.29380)": "TRACER"}


def plan_costs(names: Sequence[str] = ()) -> None:
    """Writes FLOP and peak bytes of a step of each method: ViT-B/16, B = B' = 512, fp16, one GPU.

    Args:
        names: methods that are planned; the others keep their costs. Default: all.
    """
    costs: dict[str, dict[str, float]] = json.loads(COSTS.read_text())["costs"] if names else {}
    for name in names or registry.table().presets:
        overrides = [f"objective.name={name}", *LENGTHS]
        if registry.table().targets[registry.table().presets[name].target].needs_adapters:
            overrides += ADAPTERS
        plan = plan_run(load_run_config(BASE, overrides, CONFIGS))
        costs[name] = {"flop": plan.flop_per_step, "peak_memory_bytes": plan.peak_memory_bytes}
        print(name, costs[name], flush=True)
        write_json(COSTS, {"config": BASE, "overrides": list(LENGTHS), "commit": commit(), "costs": costs})


def table() -> str:
    """The table in Markdown."""
    costs = json.loads(COSTS.read_text())["costs"]
    entries = [entry for entry in published.read() if entry.model == "ViT-B/16" and entry.metric == "top1"]
    names = configs()
    titles = " | ".join(published.TITLES[name] for name in AVERAGES)
    lines = [
        "| method | `objective.name` | configs | needs | FLOP | memory | ID | " + titles + " | from |",
        "|---" * (8 + len(AVERAGES)) + "|",
    ]
    for preset in registry.table().presets.values():
        title, shipped = f"[{preset.title}](#{anchor(preset)})", ", ".join(names[preset.name])
        fixed = title, f"`{preset.name}`", shipped, needs(preset)
        ratios = [costs[preset.name][key] / costs[BASELINE][key] for key in ("flop", "peak_memory_bytes")]
        cells = [*fixed, *(f"{ratio:.2f}" for ratio in ratios), *_published(preset.name, entries)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def anchor(preset: Preset) -> str:
    """The anchor of a method's section."""
    kept = "".join(character for character in preset.title.lower() if character.isalnum() or character in "_ -")
    return kept.replace(" ", "-")


def configs() -> dict[str, list[str]]:
    """The shipped configs of each method, in code; not those with a method in weight space."""
    names: dict[str, list[str]] = {name: [] for name in registry.table().presets}
    for path in sorted(CONFIGS.glob("*.json")):
        config = load_run_config(path.name, (), CONFIGS)
        name = config.objective.name
        assert name is not None, f"{path.name}: a pair of losses without a name has no row"
        if config.projection.name == NO_PROJECTION:
            names[name].append(f"`{path.stem}`")
    return names


def needs(preset: Preset) -> str:
    """The data and models that a method needs besides pairs of the target set."""
    references = registry.table().references
    reference = None if preset.reference is None else references[preset.reference]
    return describe(needs_of(registry.table().targets[preset.target], reference)) or "target pairs alone"


def describe(requirements: Needs) -> str:
    """Requirements as a list of words."""
    words = {
        "reference set": requirements.reference,
        "cached teacher": requirements.reference_teacher,
        "linear head": requirements.head,
        "classes": requirements.classes and not requirements.head,
        "second prompts": requirements.second_prompts,
        f"{requirements.target_teacher} teacher": requirements.target_teacher != "none",
        "fixed run length": requirements.run_length,
        "adapters": requirements.adapters,
        "prompts alone are trained": requirements.prompts,
    }
    return ", ".join(word for word, is_needed in words.items() if is_needed)


def _published(name: str, entries: list[Any]) -> list[str]:
    """Cells of ID, the averages and the source; two rows of a method are divided by a slash."""
    rows = []
    for method in PUBLISHED.get(name, ()):
        values = {entry.set: entry for entry in entries if entry.method == method}
        cells = [str(values["imagenet1k"].value)]
        for average in AVERAGES:
            printed = values.get(average)
            if printed is not None:
                cells.append(str(printed.value))
            else:
                mean = published.computed_average(values, published.AVERAGES[average])
                unit = values["imagenet1k"].unit
                cells.append("" if mean is None else str(mean.quantize(max(unit, Decimal("0.01")), ROUND_HALF_UP)))
        source = values["imagenet1k"].source
        rows.append([*cells, next((short for full, short in SHORT_SOURCES.items() if full in source), source)])
    if not rows:
        return [""] * (len(AVERAGES) + 2)
    return [" / ".join(cell or "-" for cell in column).replace("- / -", "") for column in zip(*rows, strict=True)]


def replaced(text: str) -> str:
    """A document with the present table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def main() -> None:
    """Plans if asked to, then writes the table into the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--plan", nargs="*", metavar="METHOD", help="plan steps again: of these methods, or of all"
    )
    if (names := parser.parse_args().plan) is not None:
        plan_costs(names)
    DOCUMENT.write_text(replaced(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
