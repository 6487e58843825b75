"""Evaluation during and after a run, selection of the best weights, and early stopping."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dive_fast.checkpoint.export import MODEL, SELECTED, copy_model, write_model
from dive_fast.config.schema import Config, EvaluateConfig, GeometryConfig, ReferenceConfig
from dive_fast.data.samples import ReferenceSamples
from dive_fast.evaluate.geometry.embed import embed, open_pairs
from dive_fast.evaluate.geometry.measures import GeometryError, compare
from dive_fast.evaluate.zero_shot import measure_sets, report_left_out, values
from dive_fast.identity import digest
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers, create, tokenizer_of
from dive_fast.train.average_evaluation import AverageEvaluation
from dive_fast.train.evaluation_towers import EvaluationTowers, has_all_weights
from dive_fast.train.setup import Run

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
        self._average = AverageEvaluation(run)
        self._tokenizer = tokenizer_of(run.config.model)
        self._towers: EvaluationTowers | None = None
        self._pairs: tuple[ReferenceSamples, Pairs] | None = None
        """The pairs of ``evaluate.geometry`` with their pre-trained embeddings, once they have been measured."""
        self._select = None if options.select is None else _digest_of_selection(run.config, options.select)
        """Digest of the set of ``evaluate.select``; accuracies on another set are not comparable."""
        self._best: float | None = None
        self._best_step = self._since_best = 0

    @property
    def is_over(self) -> bool:
        """Whether ``evaluate.patience`` has run out."""
        return self._options.patience is not None and self._since_best >= self._options.patience

    def is_due(self, step: int) -> bool:
        """Whether an evaluation follows ``step`` steps; with ``evaluate.select`` one follows the last step too."""
        is_last = step == self._run.total_steps and self._options.select is not None
        return self._every is not None and (step % self._every == 0 or is_last)

    def evaluate(self, step: int) -> dict[str, float]:
        """Measures the weights after ``step`` steps and keeps them if they are the best; all ranks call it.

        Returns:
            Metrics to log.
        """
        run, folder = self._run, self._run.folder / LATEST
        needs_file = not has_all_weights(run.engine)
        if needs_file:
            write_model(run.engine, folder, run.class_names)
        results = self._measure(self._during, folder if needs_file else None)
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
        if run.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        run.ranks.barrier()
        return results

    def finish(self) -> dict[str, float]:
        """Exports the weights of the run, the best ones if they were kept, and measures them on every set.

        Returns:
            Metrics to log.
        """
        run = self._run
        # The step in the folder: after a resume from an older checkpoint it may be later than that of the state.
        selected = run.ranks.broadcast(_read_selected(run.folder / BEST)) if self._best is not None else None
        if selected is not None:
            if run.ranks.is_main:
                copy_model(run.folder / BEST, run.folder)
            run.ranks.barrier()
            results = self._measure(self._options, run.folder) | {"best_step": float(selected.step)}
            return results | self._average.measure(self._options, run.folder)
        if self._best is not None:
            run.ranks.print(f"warning: {run.folder / BEST} is gone; the last weights are exported instead")
        write_model(run.engine, run.folder, run.class_names)
        results = self._measure(self._options, None if has_all_weights(run.engine) else run.folder)
        return results | self._average.measure(self._options)

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

    def _measure(self, options: EvaluateConfig, exported: Path | None) -> dict[str, float]:
        """Accuracy on each set, and the change of geometry.

        Args:
            exported: folder of the weights to measure; None measures the engine's.
        """
        run = self._run
        if not options.sets and options.geometry is None:
            return {}
        # A run draws the same random numbers with and without evaluations.
        with torch.random.fork_rng(devices=[]):
            if self._towers is None:
                self._towers = EvaluationTowers(run.config.model, run.engine)
            if exported is None:
                weights = self._towers.trained(run.class_names)
            else:
                weights = self._towers.exported(exported)
            with weights as (towers, head):
                opened = {name: run.evaluation_sets[name] for name in options.sets}
                measured = measure_sets(towers, self._tokenizer, options, opened, run.ranks, head)
                report_left_out(measured, run.ranks)
                geometry = {} if options.geometry is None else self._geometry(towers, options.geometry)
        accuracies = values(measured, options.sets)
        results = {f"accuracy/{name}": value for name, value in accuracies.items()}
        return results | {f"geometry/{name}": value for name, value in geometry.items()}

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
            # Collapsed embeddings are reported, but do not end the run.
            ranks.print(f"geometry: {error}")
            return {}


def _digest_of_selection(config: Config, name: str) -> str:
    """Digest of a set, and of the fact that averaged weights are exported, and so selected."""
    content = config.evaluate.sets[name].model_dump()
    return digest(content | {"export_ema": True} if config.train.export_ema else content)


def _read_selected(folder: Path) -> _Selected | None:
    """Step and accuracy of the best weights in a folder; None if there are none or their step is unknown."""
    try:
        content = read_json(folder / SELECTED)
        selected = _Selected(int(content["step"]), float(content["value"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return selected if (folder / MODEL).is_file() else None
