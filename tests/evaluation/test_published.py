"""Published results: values with their sources, averages of their sets, and tables with measured rows."""

import re
from decimal import Decimal
from typing import Any

import pytest

from dive_fast.errors import ConfigError
from dive_fast.evaluation.datasets.catalog import IMAGENET_OOD, IMAGENET_OOD_4, KNOWN
from dive_fast.evaluation.published import (
    ABLATION,
    AVERAGES,
    CERTAINTY,
    METRICS,
    SUSPECT,
    Published,
    comparison,
    computed_average,
    find_model,
    read,
)

MODEL = "ViT-B/16"


def values_of(method: str, metric: str = "top1", model: str = MODEL) -> dict[str, Published]:
    entries = [entry for entry in read() if (entry.model, entry.method, entry.metric) == (model, method, metric)]
    return {entry.set: entry for entry in entries}


def test_published_values_are_complete_and_distinct() -> None:
    entries = read()
    assert len({(entry.model, entry.method, entry.set, entry.metric) for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.set in KNOWN or entry.set in AVERAGES
        assert entry.metric in METRICS
        assert entry.certainty in CERTAINTY
        assert entry.source
        assert entry.seeds in ("", "3")
        assert 0 < entry.value < (100 if entry.metric == "top1" else 1)
        assert all(part == part.strip() for part in entry if isinstance(part, str))


@pytest.mark.parametrize(
    ("method", "four", "five"),
    [("DiVE", "64.725", "63.16"), ("CaRot", "64.0175", "62.54"), ("TRACER", "65.52", "64.068")],
)
def test_averages_are_computed_from_the_sets(method: str, four: str, five: str) -> None:
    values = values_of(method)
    assert computed_average(values, IMAGENET_OOD_4) == Decimal(four)
    assert computed_average(values, IMAGENET_OOD) == Decimal(five)
    assert computed_average({"ood5": values["ood5"]}, IMAGENET_OOD) is None


def test_printed_averages_follow_from_printed_sets() -> None:
    """Each set is rounded by half a unit, and so is the average; one row of a paper is off by more."""
    off = []
    for method in {(entry.model, entry.method, entry.metric) for entry in read()}:
        values = values_of(method[1], method[2], method[0])
        for name, members in AVERAGES.items():
            mean = computed_average(values, members)
            if mean is not None and name in values and abs(mean - values[name].value) > values[name].unit:
                off.append((method[1], name))
    assert off == [("Pre-trained, TRACER's table", "ood5")]


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-B-16", "ViT-B-16-quickgelu", "vit_b_16"])
def test_find_model_accepts_names_of_open_clip(name: str) -> None:
    assert find_model(name) == MODEL


def test_find_model_names_known_models() -> None:
    with pytest.raises(ConfigError, match=r"no published results of ViT-B-32.*: ViT-B/16, ViT-L/14, RN50$"):
        find_model("ViT-B-32")


def cells_of(text: str, method: str) -> list[str]:
    """The cells of a method's first line in a table."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {method} "))
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_comparison_marks_printed_averages_and_contradictions() -> None:
    text = comparison(MODEL, [])
    assert cells_of(text, "DiVE")[7:10] == ["64.73", "63.16", "63.67"]
    assert cells_of(text, "TRACER")[7:] == ["65.52", "64.07", "", "[5] P, 3 seeds"]
    assert cells_of(text, "Static self-distillation")[6:9] == ["", "59.55", ""]
    assert cells_of(text, "MERGETUNE on E2E-FT")[7:9] == ["", "62.29 printed"]
    assert (
        "Pre-trained, TRACER's table, top-1 accuracy: OOD-5 is printed as 58.39, the mean of its sets is" in text
    )
    assert "- VRF on LP-FT, top-1 accuracy: two models at test time" in text
    assert "differ: compare methods of the two tables by OOD-4, not by OOD-5" in text
    errors = text[text.index("ECE in batches of 512") :]
    assert cells_of(errors, "TRACER")[1:9] == [
        "0.045",
        "0.039",
        "0.041",
        "0.104",
        "0.078",
        "0.103",
        "0.066",
        "0.073",
    ]
    # All sources are listed, and each ablation is in one table only.
    numbers = {int(number) for group in re.findall(r"\| \[([\d, ]+)\] ", text) for number in group.split(", ")}
    listed = [int(number) for number in re.findall(r"^\[(\d+)\] ", text, re.MULTILINE)]
    assert sorted(numbers) == listed == list(range(1, len(listed) + 1))
    for entry in read():
        if entry.note == ABLATION:
            assert text.count(f"| {entry.method} ") == 1


def test_comparison_flags_misprinted_value() -> None:
    values = values_of("CaRot", "ece_batched", "RN50")
    assert values["imagenet_sketch"].note.startswith(SUSPECT)
    assert computed_average(values, ("imagenet-a", "imagenet_sketch")) is None
    text = comparison("RN50", [])
    errors = text[text.index("ECE in batches of 512") :]
    assert cells_of(errors, "CaRot")[1:5] == ["0.0471", "0.3435", "0.3435?", "0.2109? printed"]
    assert "Sketch: suspect: the table prints ImageNet-A's value for ImageNet-Sketch as well" in text


def measured(name: str, value: float, model: str = "ViT-B-16-quickgelu", **more: Any) -> dict[str, Any]:
    known = KNOWN[name]
    fields = {"label": "mine", "set": name, "dataset": name, "title": known.title, "role": known.role}
    fields |= {"metric": known.metric, "value": value, "top1": value, "model": model, "precision": "fp32"}
    return fields | more


def test_comparison_shows_measured_rows_and_what_they_lack() -> None:
    rows = [measured(name, 0.5, ece_batched=0.125) for name in ("imagenet1k", *IMAGENET_OOD_4)]
    rows.append(measured("pets", 0.75, left_out=2))
    text = comparison(MODEL, rows)
    expected = ["50.00"] * 5
    averages = ["50.00", "50.00 (4 of 5)", "75.00 (1 of 10)", "fp32, 2 samples left out"]
    assert cells_of(text, "mine (measured)")[1:] == [*expected, "", *averages]
    errors = text[text.index("ECE in batches of 512") :]
    assert cells_of(errors, "mine (measured)")[1:6] == ["0.125"] * 5
    assert "is measured with" not in text
    other = comparison("ViT-L/14", rows)
    assert "mine is measured with ViT-B-16-quickgelu: check that it is a ViT-L/14." in other
    wilds = comparison(MODEL, [measured("fmow_id", 0.5)])
    assert "(measured)" not in wilds
    assert "No measured row is shown: none is of ImageNet" in wilds
