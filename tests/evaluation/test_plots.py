"""Figures of methods and weight ensembles: one width, labels apart, panels as data has them."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dive_fast.evaluation import plots

WIDTH = 2 * 830
"""Pixels of a figure: two for each of GitHub's page."""


def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    figures: list[Any] = []
    original = plots.save_figure

    def save(figure: Any, path: Path) -> None:
        figures.append(figure)
        original(figure, path)

    monkeypatch.setattr(plots, "save_figure", save)
    return figures


def rows(**other: float) -> list[dict[str, float | str]]:
    return [
        {"method": "pretrained", "id": 0.6, "ood": 0.1, "zs": 0.7, **other},
        {"method": "flyp", "id": 0.8, "ood": 0.5, "zs": 0.4, **other},
        *({"method": "dive", "id": 0.8 + 0.01 * k, "ood": 0.55, "zs": 0.6, **other} for k in range(3)),
        *({"method": f"other {k}", "id": 0.7, "ood": 0.5, "zs": 0.5, **other} for k in range(3)),
    ]


def test_tradeoff_has_a_panel_for_each_known_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = captured(monkeypatch)
    plots.tradeoff(rows(), tmp_path / "two.png")
    plots.tradeoff(rows(rsa=0.9), tmp_path / "three.png", "a title", highlighted=("dive",))
    plots.tradeoff(rows(), tmp_path / "one.png", measures={"zs": "zero-shot"})
    assert [len(figure.axes) for figure in figures] == [2, 3, 1]
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width == WIDTH
    texts = {text.get_text(): text for text in figures[1].axes[1].texts}
    assert {"FLYP", "DiVE", "other 2", "pre-trained, ID 60.0"} <= texts.keys()
    assert texts["DiVE"].get_color() == plots.method_styles()["dive"][1] != texts["FLYP"].get_color()


def test_level_far_from_all_points_does_not_stretch_the_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = captured(monkeypatch)
    plots.tradeoff(rows(), tmp_path / "figure.png")
    ood, zero_shot = figures[0].axes
    assert ood.get_ylim()[0] > 40
    assert any(text.get_text() == "pre-trained, ID 60.0: 10.0, below" for text in ood.texts)
    assert zero_shot.get_ylim()[1] > 70


def test_labels_of_close_points_do_not_overlap() -> None:
    figure = plots.new_figure(5, 4)
    axis = figure.subplots()
    labels = [plots.Label(1 + 0.08 * k, 1 + 0.05 * (k % 2), f"a method {k}") for k in range(5)]
    axis.plot([label.x for label in labels], [label.y for label in labels], "o")
    axis.plot([0, 2], [0, 2], ",")
    plots.place_labels(axis, labels)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
    assert len(boxes) == 5
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))


def test_ensemble_labels_points_with_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = captured(monkeypatch)
    sets = ("id", *(f"set {k}" for k in range(4)))
    measured = [{"alpha": a / 4, **{name: 0.5 + a * (4 - a) / 20 for name in sets}} for a in range(5)]
    report = {"alpha": 0.5, "chosen_on": "id", "accuracies": measured}
    plots.ensemble(report | {"samples": dict.fromkeys(sets, 400)}, tmp_path / "ensemble.png")
    plots.ensemble(report, tmp_path / "unknown.png")
    # Four sets in two rows of three panels.
    assert len(figures[0].axes) == 6
    texts = {text.get_text() for text in figures[0].axes[0].texts}
    assert {"pre-trained", "0.25", "alpha = 0.5", "0.75", "fine-tuned"} <= texts


def test_alphas_are_drawn_by_tower_and_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = captured(monkeypatch)
    blocks = {
        f"{tower}resblocks.{block}.mlp.c_fc.{name}": block / 20
        for tower in ("visual.transformer.", "transformer.")
        for block in range(14)
        for name in ("weight", "bias")
    }
    others = {"visual.proj": 0.9, "visual.conv1.weight": 0.1, "head.bias": 0.5, "token_embedding.weight": 0.2}
    plots.alphas({"alphas": others | blocks | {"logit_scale": 1.0}}, tmp_path / "alphas.png")
    image, text = figures[0].axes
    assert image.get_title(loc="left") == "image tower: alpha of 31 tensors"
    assert text.get_title(loc="left") == "text tower: alpha of 29 tensors"
    labels = [label.get_text() for label in image.get_xticklabels()]
    assert labels == ["in", "1", "3", "5", "7", "9", "11", "13", "out"]
    means = image.lines[-2].get_ydata()  # the last line is the level of 0.5
    assert list(means) == pytest.approx([0.1, *(block / 20 for block in range(14)), 0.7])
    with Image.open(tmp_path / "alphas.png") as picture:
        assert picture.width == WIDTH


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("text.transformer.resblocks.11.ln_1.weight", "text.transformer.resblocks.11"),
        ("trunk.stages.2.blocks.13.mlp.fc1.weight", "trunk.stages.2.blocks.13"),
        ("layer3.0.conv1.weight", "layer3"),
        ("trunk.attn_pool.mlp.fc1.weight", plots.LAST),
        ("text.text_projection.weight", plots.LAST),
        ("trunk.stem.0.weight", plots.FIRST),
        ("class_embedding", plots.FIRST),
    ],
)
def test_depth_of_a_tensor_is_its_block(name: str, depth: str) -> None:
    assert plots._depth(name) == depth


def test_standard_error_is_that_of_a_share() -> None:
    assert plots._standard_error(50, 100) == pytest.approx(5)
    assert plots._standard_error(50, None) == plots._standard_error(100, 10) == 0
