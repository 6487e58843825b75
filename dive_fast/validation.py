"""Evaluation on the way: accuracies while a run trains, its best weights, and when it has trained enough."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dive_fast import checkpoint
from dive_fast.checkpoint import MODEL
from dive_fast.config import Config, EvaluateConfig
from dive_fast.engine import AUTOCAST
from dive_fast.evaluate import head as heads
from dive_fast.evaluate.zero_shot import evaluate
from dive_fast.ranks import Ranks
from dive_fast.run import Run
from dive_fast.towers import create, tokenizer_of

BEST, LATEST = "best", "latest"
"""Folders in the run's: weights that are the best so far on ``evaluate.select``, and those being evaluated."""


class Validation:
    """What ``evaluate`` asks for; every rank finds the same accuracies, and so decides alike."""

    def __init__(self, run: Run) -> None:
        """Begins with no evaluation made."""
        options = run.config.evaluate
        self._run, self._options = run, options
        self._every = options.every_steps
        if options.every_epochs is not None:
            self._every = options.every_epochs * run.target_order.steps_per_epoch
        during = list(options.sets) if options.during is None else options.during
        self._during = options.model_copy(update={"sets": {name: options.sets[name] for name in during}})
        self._best: float | None = None
        self._best_step = self._since_best = 0

    @property
    def is_over(self) -> bool:
        """Whether ``evaluate.patience`` has run out."""
        return self._options.patience is not None and self._since_best >= self._options.patience

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after so many steps; where the best weights are kept, after the last one too."""
        is_last = step == self._run.total_steps and self._options.select is not None
        return self._every is not None and (step % self._every == 0 or is_last)

    def evaluate(self, step: int) -> dict[str, float]:
        """Measures the weights after ``step`` steps and keeps them if they are the best; all ranks call it.

        Returns:
            What to log.
        """
        run, folder = self._run, self._run.folder / LATEST
        checkpoint.export(run.engine, folder, run.class_names)
        accuracies = measure(run.config, folder, self._during, run.ranks)
        run.ranks.barrier()
        found = {f"accuracy/{name}": value for name, value in accuracies.items()}
        if self._options.select is not None:
            accuracy = accuracies[self._options.select]
            is_best = self._best is None or accuracy > self._best
            self._since_best = 0 if is_best else self._since_best + 1
            if is_best:
                self._best, self._best_step = accuracy, step
                if run.ranks.first:
                    shutil.rmtree(run.folder / BEST, ignore_errors=True)
                    folder.rename(run.folder / BEST)
            found["best_step"] = self._best_step
        if run.ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        run.ranks.barrier()
        return found

    def finish(self) -> dict[str, float]:
        """Exports the weights of the run, the best where they were kept, and measures them on every set.

        Returns:
            What to log.
        """
        run, chosen = self._run, {}
        if self._best is None:
            checkpoint.export(run.engine, run.folder, run.class_names)
        else:
            chosen = {"best_step": float(self._best_step)}
            if run.ranks.first:
                for file in (run.folder / BEST).iterdir():
                    shutil.copyfile(file, run.folder / f".{file.name}.partial")
                    (run.folder / f".{file.name}.partial").replace(run.folder / file.name)
            run.ranks.barrier()
        accuracies = measure(run.config, run.folder, run.config.evaluate, run.ranks)
        return {f"accuracy/{name}": value for name, value in accuracies.items()} | chosen

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"best": self._best, "best_step": self._best_step, "since_best": self._since_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, if the best weights are still where they were left."""
        if state["best"] is not None and not (self._run.folder / BEST / MODEL).is_file():
            self._run.ranks.say(f"{self._run.folder / BEST}: the best weights are gone; they are chosen anew")
            return
        self._best, self._best_step, self._since_best = (state[key] for key in ("best", "best_step", "since_best"))


def measure(config: Config, folder: Path, sets: EvaluateConfig, ranks: Ranks) -> dict[str, float]:
    """Accuracies of exported weights, by set.

    They are loaded whole on every rank: under ZeRO-3 the student's own towers run only inside DeepSpeed.
    """
    if not sets.sets:
        return {}
    # A run draws the same random numbers whether it is evaluated on the way or not.
    with torch.random.fork_rng(devices=[]):
        towers = create(config.model, weights=False)
    towers = towers.load_exported(load_file(folder / MODEL)).to(ranks.device).eval()
    towers.autocast = AUTOCAST[config.train.precision]
    path = folder / heads.FILE
    head = heads.load(path) if path.is_file() else None
    return evaluate(towers, tokenizer_of(config.model), sets, ranks, head)
