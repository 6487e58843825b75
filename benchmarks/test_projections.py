"""The benchmark of methods in weight space: bytes by hand, ratios within a round, figures of a tiny run."""

import json
import sys
from pathlib import Path

import projections
import pytest
from projections import ADAMW, RULES, summarize

MODEL = "ViT-tiny"
# W and W0 are read by every pass over deviations; g and p where a rule needs them.
BYTES = {
    "L2-SP": 16,  # one pass that reads g, writes g
    "SPD": 12 + 8 + 12,  # before the step with g, after it, and one that writes W
    "FTP": 16 + 16,  # with g and p, and one that writes W and p
    "DiGraP": 16 + 20,  # with g and p, and one that reads g, writes g and p
    "DiGraP, current": 12 + 16,
}


def test_ratios_are_within_a_round() -> None:
    rounds = [{ADAMW: 1.0, "SPD": 3.0}, {ADAMW: 10.0, "SPD": 20.0}, {ADAMW: 2.0, "SPD": 5.0}]
    summary = summarize(rounds)
    assert summary["SPD"] == {"seconds": 5.0, "over_adamw": 2.5}
    assert summary[ADAMW] == {"seconds": 2.0, "over_adamw": 1.0}


def test_tiny_run_writes_figures_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model = projections.make_model
    monkeypatch.setattr(projections, "make_model", lambda name, blocks=1: make_model(name, blocks))
    monkeypatch.setattr(projections, "MODELS", {"tiny": MODEL})
    command = ["projections.py", "--model", MODEL, "--blocks", "1", "--rounds", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    projections.main()
    results = json.loads(next(tmp_path.glob("*projections.json")).read_text())
    predicted, measured = results["predicted"][MODEL], results["measured"]
    assert predicted.keys() == RULES.keys() == BYTES.keys()
    for rule, figures in predicted.items():
        # Vectors with an entry for each row are not negligible where a row has 64 elements.
        assert BYTES[rule] <= figures["bytes_per_parameter"] < BYTES[rule] * (1.4 if rule == "FTP" else 1.01), rule
        assert figures["kernel_operations"] == {"SPD": 3, "L2-SP": 1}.get(rule, 2)
        # AdamW reads and writes weights, moments and, to divide them by their scale, gradients.
        assert figures["over_adamw"] == pytest.approx(figures["bytes_per_parameter"] / 32, rel=1e-3)
    (times,) = measured["rounds"]
    assert times.keys() == measured["summary"].keys() == {ADAMW, *RULES}
    assert min(times.values()) > 0
    assert 0 < measured["parameters"] == results["parameters"][MODEL]
    planned, timed = next(tmp_path.glob("*projections.md")).read_text().split("## Measured on")
    assert "not measured" in planned
    for rule in RULES:
        assert f"| tiny | {rule} |" in planned
        assert f"| {rule} |" in timed
