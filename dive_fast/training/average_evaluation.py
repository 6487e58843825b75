"""Accuracy of the averaged weights of ``train.ema``, where ``evaluate.ema`` asks for it."""

from pathlib import Path

import torch

from dive_fast.config.schema import EvaluateConfig
from dive_fast.evaluation.zero_shot import measure_sets, values
from dive_fast.training.run_evaluation import RunEvaluation
from dive_fast.training.setup import Run


class AverageEvaluation:
    """Measures the averaged weights; without ``evaluate.ema`` it measures nothing."""

    def __init__(self, run: Run, evaluation: RunEvaluation) -> None:
        """Uses the towers and tokens of the run's other evaluations."""
        self._run, self._evaluation = run, evaluation

    def measure(self, options: EvaluateConfig, exported: Path | None = None) -> dict[str, float]:
        """Metrics ``ema_accuracy/<name>`` of each set; all ranks call it.

        Args:
            exported: folder of the averaged weights to measure; None measures the present ones.
        """
        run = self._run
        if not options.ema or not options.sets:
            return {}
        # A run draws the same random numbers with and without evaluations.
        with torch.random.fork_rng(devices=[]):
            towers, names = self._evaluation.towers(), run.class_names
            weights = towers.averaged(names) if exported is None else towers.exported_average(exported)
            with weights as (averaged, head):
                opened = {name: run.evaluation_sets[name] for name in options.sets}
                measured = measure_sets(averaged, self._evaluation.tokenizer, options, opened, run.ranks, head)
        return {f"ema_accuracy/{name}": value for name, value in values(measured, options.sets).items()}
