"""Evaluation on the way: accuracies while a run trains, its best weights, and when it has trained enough."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dive_fast.checkpoint.export import MODEL, SELECTED, copy_model, write_model
from dive_fast.config.schema import EvaluateConfig, GeometryConfig, ReferenceConfig
from dive_fast.data.samples import ReferenceSamples
from dive_fast.evaluate.geometry.embed import embed, open_pairs
from dive_fast.evaluate.geometry.measures import GeometryError, compare
from dive_fast.evaluate.zero_shot import measure_sets, report_left_out, values
from dive_fast.identity import digest
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers, create, tokenizer_of
from dive_fast.train.evaluation_towers import EvaluationTowers, has_all_weights
from dive_fast.train.setup import Run

BEST, LATEST = "best", "latest"
"""Folders in the run's: weights that are the best so far on ``evaluate.select``, and those being evaluated."""


class Validation:
    """What ``evaluate`` asks for; every rank finds the same accuracies, and so decides alike."""

    def __init__(self, run: Run) -> None:
        """Starts without any evaluation."""
        options = run.config.evaluate
        self._run, self._options = run, options
        self._every = options.every_steps
        if options.every_epochs is not None:
            self._every = options.every_epochs * run.target_order.steps_per_epoch
        during = list(options.sets) if options.during is None else options.during
        self._during = options.model_copy(update={"sets": {name: options.sets[name] for name in during}})
        self._tokenizer = tokenizer_of(run.config.model)
        self._towers: EvaluationTowers | None = None
        self._pairs: tuple[ReferenceSamples, Pairs] | None = None
        """Those that geometry is measured on, and what the pre-trained model makes of them; once it has been."""
        self._select = None if options.select is None else digest(options.sets[options.select].model_dump())
        """What accuracies are compared on; those of another set are not comparable."""
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
        needs_file = not has_all_weights(run.engine)
        if needs_file:
            write_model(run.engine, folder, run.class_names)
        found = self._measure(self._during, folder if needs_file else None)
        run.ranks.barrier()
        if self._options.select is not None:
            accuracy = found[f"accuracy/{self._options.select}"]
            # The same step again is the same weights: a kill came between them and the note of them.
            is_best = self._best is None or accuracy > self._best or step == self._best_step
            self._since_best = 0 if is_best else self._since_best + 1
            if is_best:
                self._best, self._best_step = accuracy, step
                if not needs_file:
                    write_model(run.engine, folder, run.class_names)
                if run.ranks.is_main:
                    write_atomic(folder / SELECTED, json.dumps({"step": step, "value": accuracy}).encode())
                    shutil.rmtree(run.folder / BEST, ignore_errors=True)
                    folder.rename(run.folder / BEST)
            found["best_step"] = self._best_step
        if run.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        run.ranks.barrier()
        return found

    def finish(self) -> dict[str, float]:
        """Exports the weights of the run, the best where they were kept, and measures them on every set.

        Returns:
            What to log.
        """
        run, chosen = self._run, {}
        # The folder's own step: after a resume from an older checkpoint it may be a later one.
        found = run.ranks.broadcast(_selected(run.folder / BEST)) if self._best is not None else None
        if found is not None:
            chosen = {"best_step": float(found[0])}
            if run.ranks.is_main:
                copy_model(run.folder / BEST, run.folder)
            run.ranks.barrier()
        else:
            if self._best is not None:
                run.ranks.print(f"warning: {run.folder / BEST} is gone; the last weights are exported instead")
            write_model(run.engine, run.folder, run.class_names)
        is_engines = not chosen and has_all_weights(run.engine)
        return self._measure(self._options, None if is_engines else run.folder) | chosen

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and what they were measured on."""
        return {
            "best": self._best,
            "best_step": self._best_step,
            "since_best": self._since_best,
            "select": self._select,
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Resumes after ``step`` steps, if the best weights are where they were left and still comparable."""
        ranks, best = self._run.ranks, self._run.folder / BEST
        found = ranks.broadcast(_selected(best))
        if self._select is None or (state["best"] is None and (found is None or found[0] != step)):
            return
        total = self._run.total_steps
        outcome = "the best weights are chosen again" if step < total else "the last weights are exported instead"
        if state["select"] != self._select:
            ranks.print(f"evaluate.select: measured otherwise before step {step}; {outcome}")
            return
        if found is None:
            ranks.print(f"{best}: the best weights are gone; {outcome}")
            return
        # A run that goes back by some steps makes better weights of a later step again.
        comes_again = step < found[0] <= total and found[1] > (state["best"] or 0.0) and self.is_due(found[0])
        if found[0] == step and (state["best"] is None or found[1] > state["best"]):
            # A kill came between them and the note of them.
            state = state | {"best": found[1], "best_step": step, "since_best": 0}
        elif found != (state["best_step"], state["best"]) and not comes_again:
            ranks.print(
                f"{best}: of step {found[0]}, not {state['best_step']} as the checkpoint has it; {outcome}"
            )
            return
        self._best, self._best_step, self._since_best = (state[key] for key in ("best", "best_step", "since_best"))

    def _measure(self, options: EvaluateConfig, exported: Path | None) -> dict[str, float]:
        """Accuracy on each set, and how the geometry has moved.

        Args:
            exported: folder of the weights to measure; None: the engine's.
        """
        run = self._run
        if not options.sets and options.geometry is None:
            return {}
        # A run draws the same random numbers whether it is evaluated on the way or not.
        with torch.random.fork_rng(devices=[]):
            if self._towers is None:
                self._towers = EvaluationTowers(run.config.model, run.engine)
            weights = (
                self._towers.trained(run.class_names) if exported is None else self._towers.exported(exported)
            )
            with weights as (towers, head):
                opened = {name: run.evaluation_sets[name] for name in options.sets}
                measured = measure_sets(towers, self._tokenizer, options, opened, run.ranks, head)
                report_left_out(measured, run.ranks)
                moved = {} if options.geometry is None else self._geometry(towers, options.geometry)
        accuracies = values(measured, options.sets)
        found = {f"accuracy/{name}": value for name, value in accuracies.items()}
        return found | {f"geometry/{name}": value for name, value in moved.items()}

    def _geometry(self, towers: Towers, options: GeometryConfig) -> dict[str, float]:
        config, ranks = self._run.config, self._run.ranks
        batch_size, workers = self._options.batch_size, self._options.workers
        if self._pairs is None:
            frozen = create(config.model).to(ranks.device)
            data = ReferenceConfig(format=options.format, path=options.path, image_root=options.image_root)
            samples = open_pairs(config.model, data, frozen, self._run.geometry_source)
            self._pairs = samples, embed(frozen, samples, ranks, batch_size, workers, options.pairs)
        samples, before = self._pairs
        after = embed(towers, samples, ranks, batch_size, workers, options.pairs)
        try:
            return compare(before, after)
        except GeometryError as error:
            # Embeddings that have collapsed are for the user to see, and no reason to lose the run.
            ranks.print(f"geometry: {error}")
            return {}


def _selected(folder: Path) -> tuple[int, float] | None:
    """Step and accuracy of the best weights; None where there are none, or it is unknown of which step."""
    try:
        found = read_json(folder / SELECTED)
        step, value = int(found["step"]), float(found["value"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return (step, value) if (folder / MODEL).is_file() else None
