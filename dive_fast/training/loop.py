"""The training loop: batches, steps, metrics, checkpoints, evaluations, and at the end a model for open_clip."""

import logging
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from dive_fast.checkpoint import manifest
from dive_fast.checkpoint.resume import load_checkpoint
from dive_fast.checkpoint.saver import Saver
from dive_fast.config.schema import Config, TeacherConfig, TrainConfig
from dive_fast.distributed import Ranks
from dive_fast.engine.profiler import span, tracing
from dive_fast.errors import AllRanksError, ConfigError, machine_error
from dive_fast.fault_tolerance.consensus import Consensus
from dive_fast.fault_tolerance.heartbeat import Watch
from dive_fast.fault_tolerance.nonfinite import NonFinite
from dive_fast.locks import folder_lock
from dive_fast.methods.method import FirstStep
from dive_fast.teacher.audit import allowed
from dive_fast.training.metrics import Metrics
from dive_fast.training.model_card import write_card
from dive_fast.training.preflight import check_environment, check_inputs
from dive_fast.training.run_folder import check_shared
from dive_fast.training.setup import Run, batches, build
from dive_fast.training.trackers import Trackers
from dive_fast.training.validation import Validation
from dive_fast.training.write_report import write_report

logger = logging.getLogger(__name__)


class Stopped(AllRanksError):  # noqa: N818 - not an error
    """The run was asked to stop and has been saved; the same command resumes it."""


def train(config: Config, folder: Path, ranks: Ranks) -> dict[str, float]:
    """Trains from the newest checkpoint, or from the start, to the end; returns the final metrics.

    Leaves ``metrics.jsonl``, ``config.json``, ``checkpoints/`` and ``model.safetensors`` in ``folder``: the last
    weights, or with ``evaluate.select`` the best ones, and next to them the head if there is one.

    Raises:
        ConfigError, DataError: invalid config or data; the message says what to change.
        Stopped: a signal asked the run to stop.
        SaveError: the last checkpoint, or with ``train.on_save_error = stop`` any, could not be written.
        NonFiniteError: ``train.nonfinite_limit`` was reached.
        MetricsError: a line of ``metrics.jsonl`` could not be written, even at the end; with
            ``train.on_save_error = stop``, at once.
        MachineError: memory, disk, open files, loader processes or devices failed.
        StalledError: no batch came for ``train.rank_timeout`` seconds, outside of the loop.
        LockedError: another process uses the folder.
        LostError: another rank failed, died or hangs; where it cannot be raised, the exit code is ``LOST``.
    """
    with Watch(ranks, config.train.rank_timeout) as watch, watch.handling_signals():
        try:
            with ranks.raise_on_all(ConfigError):
                check_inputs(config, folder)
            check_environment(config, folder, ranks)
            with folder_lock(folder, "run folder", ranks=ranks, remedy="set train.output to another folder"):
                check_shared(folder, ranks)
                run = build(config, folder, ranks)
                with _tracking(run) as trackers:
                    return _loop(run, watch, trackers)
        except (OSError, RuntimeError, MemoryError) as error:
            # This rank's own error first: another rank that is only late is not its cause.
            if (translated := machine_error(error)) is not None:
                raise translated from error
            # Of a collective that a rank did not join, torch reports only that it failed.
            if isinstance(error, RuntimeError) and (cause := watch.find_cause()) is not None:
                raise cause from error
            raise


@contextmanager
def _tracking(run: Run) -> Iterator[Trackers]:
    """The trackers of a run, which learn at the end whether it has finished, was stopped or failed."""
    trackers = Trackers(run.config.track, run.folder, run.record.run, run.ranks)
    state = "failed"
    try:
        yield trackers
        state = "finished"
    except Stopped:
        state = "stopped"
        raise
    finally:
        trackers.close(state)


def _loop(run: Run, watch: Watch, trackers: Trackers) -> dict[str, float]:
    engine, options, folder = run.engine, run.config.train, run.folder
    checkpoints, ranks = folder / manifest.FOLDER, run.ranks
    validation, step, latest, evaluation = Validation(run), 0, {}, None
    is_complete = False
    if run.checkpoint is not None:
        state = load_checkpoint(engine, run.checkpoint)
        step, latest = state["step"], state["metrics"]
        with ranks.raise_on_all(ConfigError):
            evaluation = manifest.read_evaluation(run.checkpoint) if ranks.is_main else None
        evaluation = ranks.broadcast(evaluation)
        validation.load_state_dict(state["validation"] if evaluation is None else evaluation.validation, step)
        is_complete = step == run.total_steps or validation.is_over
        position, reason = f"step {step} of {run.total_steps}", ", evaluate.patience ran out" * validation.is_over
        ranks.print(
            f"already complete: {position}{reason}; exports the model again; train.resume=never trains again"
            if is_complete
            else f"continues after {position}, from {run.checkpoint}"
        )
    if not is_complete:
        watch.set_phase(step, "evaluation", is_saved=True)
        validation.start()
        watch.set_phase(step, "start", is_saved=True)
    saver, consensus = Saver(engine, checkpoints, options, run.record), Consensus(ranks)
    nonfinite = NonFinite(options.nonfinite_limit, folder, ranks)
    loaded = batches(run, range(step, step if validation.is_over else run.total_steps))
    metrics = Metrics(run, step, loaded, latest, None if evaluation is None else evaluation.metrics, trackers)

    def evaluate(checkpoint: Path | None) -> None:
        watch.set_phase(step, "evaluation", is_saved=checkpoint is not None)
        with metrics.paused():
            results = validation.evaluate(step)
            metrics.write(step, results)
            if checkpoint is not None and checkpoint.parent == checkpoints and ranks.is_main:
                _add_evaluation(checkpoint, validation, results)

    start = step
    with (
        closing(loaded),
        tracing(options.trace_steps, folder / "trace.json.gz", run.ranks) as traced,
    ):
        if step and evaluation is None and not validation.is_over and validation.is_due(step):
            # The run ended between the checkpoint and its evaluation.
            evaluate(run.checkpoint)
        while step < run.total_steps and not validation.is_over:
            watch.set_phase(step + 1, "data", is_saved=step == start)
            if watch.should_leave(step + 1, loaded.wait):
                watch.set_phase(step, "checkpoint")
                consensus.settle()
                saver.save(
                    step,
                    validation.state_dict(),
                    metrics.state_dict(),
                    before_write=metrics.write_waiting,
                    required=True,
                )
                saver.finish(required=True)
                raise Stopped(
                    f"{watch.stop_reason}: saved after step {step} of {run.total_steps}, no batch has come"
                )
            batch = next(loaded)
            watch.set_phase(step + 1, "step", is_saved=step == start)
            nonfinite.record_samples(step + 1, batch)
            if batch.reference is not None and batch.teacher is None and run.teacher is not None:
                with span("teacher"):
                    batch.teacher = run.teacher(batch.reference)
            learning_rate = engine.learning_rate
            values = engine.step(batch)
            step += 1
            if step == 1 and not engine.features_are_random:
                engine.method.check_first_step(_first_step(values, options, run.config.teacher))
            nonfinite.record_outcome(step, engine.scale.nonfinite_in_row)
            metrics.log(step, values, learning_rate)
            traced()
            votes = saver.votes()._replace(stop=watch.stop_reason is not None, nonfinite=nonfinite.limit_reached)
            decision = consensus(votes)
            saver.advance(decision)
            if decision.nonfinite:
                saver.finish()
                raise nonfinite.error()
            is_due, every = validation.is_due(step), options.checkpoint_every
            is_leaving = bool(decision.stop) or step == run.total_steps
            if is_due or is_leaving or (every is not None and step % every == 0):
                watch.set_phase(step, "checkpoint")
                states = validation.state_dict(), metrics.state_dict()
                saver.save(step, *states, before_write=metrics.write_waiting, required=is_leaving)
            if is_due or is_leaving:
                # Complete before the evaluation, which may be interrupted at any time.
                saver.finish(required=is_leaving)
            if decision.stop and step < run.total_steps:
                consensus.settle()
                raise Stopped(
                    f"{watch.stop_reason or 'asked to stop'}: saved after step {step} of {run.total_steps}"
                )
            if is_due:
                evaluate(manifest.checkpoint_path(checkpoints, step) if saver.newest == step else None)
        consensus.settle()
    if start < step < run.total_steps:
        ranks.print(f"stops after step {step} of {run.total_steps}: {validation.patience_in_words}")
    watch.set_phase(step, "end", is_saved=True)
    results, report = validation.finish(step)
    final = metrics.close(step, results)
    if ranks.is_main:
        write_report(report, folder, None if engine.projection is None else engine.projection.rule)
        write_card(report, run)
    ranks.print(f"\n{report.text()}")
    return final


def _add_evaluation(checkpoint: Path, validation: Validation, results: dict[str, float]) -> None:
    """Adds the results of an evaluation to the checkpoint of its weights; rank 0 calls it."""
    values = {name: value if math.isfinite(value) else None for name, value in results.items()}
    try:
        manifest.write_evaluation(checkpoint, manifest.Evaluation(validation.state_dict(), values))
    except OSError as error:
        # A run that resumes here with the same settings repeats the evaluation.
        logger.warning("cannot add the evaluation to %s: %s", checkpoint, error)


def _first_step(values: dict[str, torch.Tensor], train: TrainConfig, teacher: TeacherConfig) -> FirstStep:
    tolerance = allowed(teacher.dtype, teacher.tolerance) if teacher.mode == "cache" else None
    return FirstStep(values, train.precision, tolerance)
