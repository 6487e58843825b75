"""The loop: batches in, steps, metrics, checkpoints, and at the end a model that open_clip loads."""

import logging
import math
from contextlib import closing
from pathlib import Path

import torch

from dive_fast.checkpoint import manifest as checkpoint
from dive_fast.checkpoint import resume
from dive_fast.checkpoint.saver import Saver
from dive_fast.config.schema import Config
from dive_fast.distributed import Ranks
from dive_fast.engine.profiler import span, tracing
from dive_fast.errors import AllRanksError, ConfigError, machine_error
from dive_fast.fault_tolerance.consensus import Consensus
from dive_fast.fault_tolerance.heartbeat import Watch
from dive_fast.fault_tolerance.nonfinite import NonFinite
from dive_fast.locks import folder_lock
from dive_fast.methods.method import FirstStep
from dive_fast.teacher.audit import allowed
from dive_fast.train.metrics import Metrics
from dive_fast.train.preflight import check_environment, check_inputs
from dive_fast.train.setup import Run, batches, build, check_shared
from dive_fast.train.validation import Validation

logger = logging.getLogger(__name__)


class Stopped(AllRanksError):  # noqa: N818 - nothing went wrong
    """The run was asked to stop, has been saved, and goes on when it is started again."""


def train(config: Config, folder: Path, ranks: Ranks) -> dict[str, float]:
    """Runs a config from its newest checkpoint, or its start, to its end; returns the final metrics.

    Leaves ``metrics.jsonl``, ``config.json``, ``checkpoints/`` and ``model.safetensors`` in ``folder``: the last
    weights, or the best ones where ``evaluate.select`` says on what. A trained head stands beside them.

    Raises:
        ConfigError, DataError: the user's to mend; the message says how.
        Stopped: a signal asked for it.
        SaveError: the last checkpoint, or with ``train.on_save_error = stop`` any, could not be written.
        NonFiniteError: ``train.nonfinite_limit`` was reached.
        MetricsError: ``metrics.jsonl`` could not be written to the end, or with ``on_save_error = stop`` at once.
        MachineError: memory, disk, open files, loader processes or devices failed.
        StalledError: no batch came for ``train.rank_timeout`` seconds, outside of the loop.
        LockedError: another process uses the folder.
        LostError: another rank failed, died or hangs; or the process is left with exit code ``LOST``.
    """
    with Watch(ranks, config.train.rank_timeout) as watch, watch.handling_signals():
        try:
            with ranks.raise_on_all(ConfigError):
                check_inputs(config, folder)
            check_environment(config, folder, ranks)
            with folder_lock(folder, "run folder", ranks=ranks, remedy="set train.output to another folder"):
                check_shared(folder, ranks)
                return _loop(build(config, folder, ranks), watch)
        except (OSError, RuntimeError, MemoryError) as error:
            # First what is this rank's own: a rank that is merely late must not be blamed for it.
            if (found := machine_error(error)) is not None:
                raise found from error
            # Of a collective that one rank did not come to torch knows no more than that.
            if isinstance(error, RuntimeError) and (lost := watch.find_cause()) is not None:
                raise lost from error
            raise


def _loop(run: Run, watch: Watch) -> dict[str, float]:
    engine, options, folder = run.engine, run.config.train, run.folder
    checkpoints, ranks = folder / checkpoint.FOLDER, run.ranks
    validation, step, newest, evaluation = Validation(run), 0, {}, None
    if run.checkpoint is not None:
        found = resume.load_checkpoint(engine, run.checkpoint)
        step, newest = found["step"], found["metrics"]
        with ranks.raise_on_all(ConfigError):
            evaluation = checkpoint.read_evaluation(run.checkpoint) if ranks.is_main else None
        evaluation = ranks.broadcast(evaluation)
        validation.load_state_dict(found["validation"] if evaluation is None else evaluation.validation, step)
        is_complete = step == run.total_steps or validation.is_over
        so_far, why = f"step {step} of {run.total_steps}", ", evaluate.patience ran out" * validation.is_over
        ranks.print(
            f"already complete: {so_far}{why}; exports the model again; train.resume=never trains again"
            if is_complete
            else f"continues after {so_far}, from {run.checkpoint}"
        )
    saver, consensus = Saver(engine, checkpoints, options, run.record), Consensus(ranks)
    nonfinite = NonFinite(options.nonfinite_limit, folder, ranks)
    ahead = batches(run, range(step, step if validation.is_over else run.total_steps))
    metrics = Metrics(run, step, ahead, newest, None if evaluation is None else evaluation.metrics)

    def evaluate(saved: Path | None) -> None:
        watch.set_phase(step, "evaluation", is_saved=saved is not None)
        with metrics.paused():
            found = validation.evaluate(step)
            metrics.write(step, found)
            if saved is not None and saved.parent == checkpoints and ranks.is_main:
                _note_evaluation(saved, validation, found)

    begun = step
    with (
        closing(ahead),
        tracing(options.trace_steps, folder / "trace.json.gz", run.ranks) as traced,
    ):
        if step and evaluation is None and not validation.is_over and validation.is_due(step):
            # The checkpoint was written before it.
            evaluate(run.checkpoint)
        while step < run.total_steps and not validation.is_over:
            watch.set_phase(step + 1, "data", is_saved=step == begun)
            if watch.should_leave(step + 1, ahead.wait):
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
            given = next(ahead)
            watch.set_phase(step + 1, "step", is_saved=step == begun)
            nonfinite.record_samples(step + 1, given)
            if given.reference is not None and given.teacher is None and run.teacher is not None:
                with span("teacher"):
                    given.teacher = run.teacher(given.reference)
            learning_rate = engine.learning_rate
            values = engine.step(given)
            step += 1
            if step == 1 and not engine.is_random:
                engine.method.check_first_step(_first_step(values, run.config))
            nonfinite.record_outcome(step, engine.scale.nonfinite_in_row)
            metrics.log(step, values, learning_rate)
            traced()
            own = saver.votes()
            agreed = consensus(own._replace(stop=watch.stop_reason is not None, nonfinite=nonfinite.limit_reached))
            saver.advance(agreed)
            if agreed.nonfinite:
                saver.finish()
                raise nonfinite.error()
            is_due, every = validation.is_due(step), options.checkpoint_every
            # An evaluation may be left at any moment, since what it starts from is whole.
            is_leaving = bool(agreed.stop) or step == run.total_steps
            if is_due or is_leaving or (every is not None and step % every == 0):
                watch.set_phase(step, "checkpoint")
                states = validation.state_dict(), metrics.state_dict()
                saver.save(step, *states, before_write=metrics.write_waiting, required=is_leaving)
            if is_due or is_leaving:
                saver.finish(required=is_leaving)
            if agreed.stop and step < run.total_steps:
                consensus.settle()
                raise Stopped(
                    f"{watch.stop_reason or 'asked to stop'}: saved after step {step} of {run.total_steps}"
                )
            if is_due:
                evaluate(checkpoint.checkpoint_path(checkpoints, step) if saver.newest == step else None)
        consensus.settle()
    watch.set_phase(step, "end", is_saved=True)
    return metrics.close(step, validation.finish())


def _note_evaluation(saved: Path, validation: Validation, found: dict[str, float]) -> None:
    """Adds an evaluation to the checkpoint of its weights, on the first rank."""
    numbers = {name: value if math.isfinite(value) else None for name, value in found.items()}
    try:
        checkpoint.write_evaluation(saved, checkpoint.Evaluation(validation.state_dict(), numbers))
    except OSError as error:
        # A run that resumes here with the same settings makes it again.
        logger.warning("cannot add the evaluation to %s: %s", saved, error)


def _first_step(values: dict[str, torch.Tensor], config: Config) -> FirstStep:
    teacher = config.teacher
    tolerance = allowed(teacher.dtype, teacher.tolerance) if teacher.mode == "cache" else None
    return FirstStep(values, config.train.precision, tolerance)
