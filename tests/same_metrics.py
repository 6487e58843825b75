"""Comparison of metrics that were measured with other batches: counts exactly, probabilities up to rounding."""

from collections.abc import Mapping

import pytest

from dive_fast.evaluation import calibration


def assert_same_metrics(metrics: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """Compares accuracies and recalls exactly; the towers round probabilities differently in other batches."""
    assert list(metrics) == list(expected)
    for name, value in metrics.items():
        close = name in calibration.METRICS
        assert value == (pytest.approx(expected[name], abs=1e-5) if close else expected[name]), name
