"""Accuracy of the averaged weights of ``train.ema``, where ``evaluate.ema`` asks for it."""

from pathlib import Path

import torch

from dive_fast.config.schema import EvaluateConfig
from dive_fast.evaluation.zero_shot import measure_sets, values
from dive_fast.model.towers import tokenizer_of
from dive_fast.training.evaluation_towers import EvaluationTowers
from dive_fast.training.setup import Run


class AverageEvaluation:
    """Measures the averaged weights; without ``evaluate.ema`` it measures nothing."""

    def __init__(self, run: Run) -> None:
        """Builds nothing yet."""
        self._run = run
        self._towers: EvaluationTowers | None = None

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
            if self._towers is None:
                self._towers = EvaluationTowers(run.config.model, run.engine)
            names = run.class_names
            weights = self._towers.averaged(names) if exported is None else self._towers.exported_average(exported)
            with weights as (towers, head):
                opened = {name: run.evaluation_sets[name] for name in options.sets}
                tokenizer = tokenizer_of(run.config.model)
                measured = measure_sets(towers, tokenizer, options, opened, run.ranks, head)
        return {f"ema_accuracy/{name}": value for name, value in values(measured, options.sets).items()}
