"""Evaluation during and after a run, selection of the best weights, and early stopping."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.checkpoint.export import MODEL, PROMPTS, SELECTED, copy_model, write_model
from dive_fast.errors import UserError
from dive_fast.evaluation.datasets.resolve import metric_of
from dive_fast.evaluation.evaluator import set_identity
from dive_fast.evaluation.zero_shot import values
from dive_fast.identity import digest
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json
from dive_fast.training.average_evaluation import AverageEvaluation
from dive_fast.training.evaluation_towers import has_all_weights
from dive_fast.training.run_evaluation import RunEvaluation
from dive_fast.training.run_report import Report, accuracy_line
from dive_fast.training.setup import Run
from dive_fast.training.write_report import make_report

BEST, LATEST = "best", "latest"
"""Folders in the run folder: the best weights on ``evaluate.select`` so far, and weights under evaluation."""


class _Selected(NamedTuple):
    """The best weights in a folder."""

    step: int
    accuracy: float


class Validation:
    """The evaluations of a run; every rank gets the same accuracies and so makes the same decisions."""

    def __init__(self, run: Run) -> None:
        """Starts without any evaluation."""
        options = run.config.evaluate
        self._run, self._options = run, options
        self._every = options.every_steps
        if options.every_epochs is not None:
            self._every = options.every_epochs * run.target_order.steps_per_epoch
        during = list(options.sets) if options.during is None else options.during
        self._during = options.model_copy(update={"sets": {name: options.sets[name] for name in during}})
        self._evaluation = RunEvaluation(run)
        self._average = AverageEvaluation(run, self._evaluation)
        self._select = None if options.select is None else _digest_of_selection(run, options.select)
        """Digest of the set of ``evaluate.select``; accuracies on another set are not comparable."""
        self._best: float | None = None
        self._best_step = self._since_best = 0

    @property
    def is_over(self) -> bool:
        """Whether ``evaluate.patience`` has run out."""
        return self._options.patience is not None and self._since_best >= self._options.patience

    @property
    def patience_in_words(self) -> str:
        """The reason of an early stop."""
        evaluations = f"{self._since_best} evaluation{'s' * (self._since_best != 1)}"
        return f"{evaluations} without a better accuracy on {self._options.select} (evaluate.patience)"

    def is_due(self, step: int) -> bool:
        """Whether an evaluation follows ``step`` steps; with ``evaluate.select`` one follows the last step too."""
        is_last = step == self._run.total_steps and self._options.select is not None
        return self._every is not None and (step % self._every == 0 or is_last)

    def start(self) -> None:
        """Measures the pre-trained model before the first step of this process; all ranks call it."""
        self._evaluation.measure_before(embeds_pairs=True)
        if before := values(self._evaluation.before, self._options.sets):
            self._run.ranks.print(f"pre-trained: {accuracy_line(before)}")

    def evaluate(self, step: int) -> dict[str, float]:
        """Measures the weights after ``step`` steps and keeps them if they are the best; all ranks call it.

        Returns:
            Metrics to log.
        """
        run, folder = self._run, self._run.folder / LATEST
        needs_file = not has_all_weights(run.engine)
        if needs_file:
            write_model(run.engine, folder, run.class_names)
        measured = self._evaluation.measure_during(self._during, folder if needs_file else None)
        results = measured.metrics(self._during)
        results |= self._average.measure(self._during)
        run.ranks.barrier()
        if self._options.select is not None:
            accuracy = results[f"accuracy/{self._options.select}"]
            # The best step again has the same weights: the run was killed before it recorded the evaluation.
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
            results["best_step"] = self._best_step
        if measured.sets:
            best = self._options.select if self._best_step == step else None
            accuracies = accuracy_line(values(measured.sets, self._during.sets), best)
            run.ranks.print(f"step {step} of {run.total_steps}: {accuracies}")
        if run.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        run.ranks.barrier()
        return results

    def finish(self, step: int) -> tuple[dict[str, float], Report]:
        """Exports the weights of the run, the best ones if they were kept, and measures them on every set.

        Args:
            step: the last step of the run.

        Returns:
            Metrics to log, and the report of the run.
        """
        run = self._run
        # The step in the folder: after a resume from an older checkpoint it may be later than that of the state.
        selected = run.ranks.broadcast(_read_selected(run.folder / BEST)) if self._best is not None else None
        if selected is not None:
            if run.ranks.is_main:
                copy_model(run.folder / BEST, run.folder)
            run.ranks.barrier()
            exported: Path | None = run.folder
        else:
            if self._best is not None:
                run.ranks.print(f"warning: {run.folder / BEST} is gone; the last weights are exported instead")
            write_model(run.engine, run.folder, run.class_names)
            exported = None if has_all_weights(run.engine) else run.folder
        measured = self._evaluation.measure_after(exported)
        metrics = measured.metrics(self._options)
        metrics |= self._average.measure(self._options, None if selected is None else run.folder)
        if selected is not None:
            metrics["best_step"] = float(selected.step)
        weights_step = step if selected is None else selected.step
        report = make_report(
            run,
            self._evaluation.before,
            measured,
            weights_step,
            None if selected is None else self._options.select,
        )
        return metrics, report

    def state_dict(self) -> dict[str, Any]:
        """The best accuracy, its step, and the digest of the set it was measured on."""
        return {
            "best": self._best,
            "best_step": self._best_step,
            "since_best": self._since_best,
            "select": self._select,
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Restores the state after ``step`` steps if the best weights still exist and are comparable."""
        ranks, best = self._run.ranks, self._run.folder / BEST
        selected = ranks.broadcast(_read_selected(best))
        if self._select is None or (state["best"] is None and (selected is None or selected.step != step)):
            return
        total = self._run.total_steps
        outcome = "the best weights are chosen again" if step < total else "the last weights are exported instead"
        if state["select"] != self._select:
            ranks.print(f"evaluate.select: another set, or other settings of it, before step {step}; {outcome}")
            return
        if selected is None:
            ranks.print(f"{best}: the best weights are gone; {outcome}")
            return
        # A run that goes back by some steps reaches the better weights of a later step again.
        is_reached_again = (
            step < selected.step <= total
            and selected.accuracy > (state["best"] or 0.0)
            and self.is_due(selected.step)
        )
        if selected.step == step and (state["best"] is None or selected.accuracy > state["best"]):
            # The run was killed before it recorded the evaluation.
            state = state | {"best": selected.accuracy, "best_step": step, "since_best": 0}
        elif selected != (state["best_step"], state["best"]) and not is_reached_again:
            ranks.print(
                f"{best}: weights of step {selected.step}, not of step {state['best_step']} as in the checkpoint; "
                f"{outcome}"
            )
            return
        self._best, self._best_step, self._since_best = (state[key] for key in ("best", "best_step", "since_best"))


def _digest_of_selection(run: Run, name: str) -> str:
    """Digest of everything that an accuracy for selection depends on besides the weights; all ranks call it.

    It has the contents of the set instead of its paths: a set that was moved is the same, and one that was changed
    in place is another. With ``train.export_ema`` the averaged weights are selected.
    """
    opened, config = run.evaluation_sets[name], run.config
    value = ""
    with run.ranks.raise_on_all(UserError):
        if run.ranks.is_main:
            content = set_identity(opened, None, 0.0)
            del content["data"]["modified"]
            content["metric"] = metric_of(config.evaluate.sets[name])
            value = digest(content | {"export_ema": True} if config.train.export_ema else content)
    return run.ranks.broadcast(value)


def _read_selected(folder: Path) -> _Selected | None:
    """Step and accuracy of the best weights in a folder; None if there are none or their step is unknown."""
    try:
        content = read_json(folder / SELECTED)
        selected = _Selected(int(content["step"]), float(content["value"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return selected if any((folder / name).is_file() for name in (MODEL, PROMPTS)) else None
