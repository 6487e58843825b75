"""The loop: batches in, steps, metrics, checkpoints, and at the end a model that open_clip loads."""

from contextlib import closing
from pathlib import Path

import torch

from dive_fast import checkpoint
from dive_fast.config import Config, ConfigError
from dive_fast.metrics import DIFFERENCE_VECTORS, Metrics
from dive_fast.ranks import Ranks
from dive_fast.run import batches, build
from dive_fast.teacher.audit import allowed
from dive_fast.trace import span, tracing
from dive_fast.validation import Validation

NOISE_FLOOR = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
"""Largest mean |u| and |v| allowed before the first update, where the tuned model is the frozen one and only the
rounding of the forward pass is left (measured: 1.2e-3 in fp16, 9.1e-3 in bf16): more means a wrong cache."""


def train(config: Config, folder: Path, ranks: Ranks) -> dict[str, float]:
    """Runs a config from its newest checkpoint, or its start, to its end; returns the final metrics.

    Leaves ``metrics.jsonl``, ``config.json``, ``checkpoints/`` and ``model.safetensors`` in ``folder``: the last
    weights, or the best ones where ``evaluate.select`` says on what. A trained head stands beside them.

    Raises:
        ConfigError, DataError: the user's to mend; the message says how.
    """
    run = build(config, folder, ranks)
    engine, options, checkpoints = run.engine, config.train, folder / "checkpoints"
    validation, step = Validation(run), 0
    if run.checkpoint is not None:
        step, found = checkpoint.load(engine, run.checkpoint)
        validation.load_state_dict(found)
    steps = range(step, step if validation.is_over else run.total_steps)
    ahead = batches(run, steps)
    metrics = Metrics(run, step, ahead)
    with closing(ahead), tracing(options.trace_steps, folder / "trace.json.gz", ranks) as traced:
        for given in ahead:
            if given.reference is not None and given.teacher is None and run.teacher is not None:
                with span("teacher"):
                    given.teacher = run.teacher(given.reference)
            learning_rate = engine.learning_rate
            values = engine.step(given)
            step += 1
            if step == 1:
                _check_noise_floor(values, config)
            metrics.log(step, values, learning_rate)
            traced()
            if validation.is_due(step):
                with metrics.standing_still():
                    metrics.write(step, validation.evaluate(step))
            is_last = step == run.total_steps or validation.is_over
            if is_last or (options.checkpoint_every and step % options.checkpoint_every == 0):
                metrics.flush()
                checkpoint.save(engine, checkpoints, step, options.keep_checkpoints, validation.state_dict())
            if is_last:
                break
    return metrics.close(step, validation.finish())


def _check_noise_floor(values: dict[str, torch.Tensor], config: Config) -> None:
    bound, teacher = NOISE_FLOOR[config.train.precision], config.teacher
    if teacher.mode == "cache":
        # What the audit lets pass is there too.
        bound = max(bound, allowed(teacher.dtype, teacher.tolerance))
    for name, symbol in DIFFERENCE_VECTORS.items():
        if name in values and float(values[name]) > bound:
            raise ConfigError(
                f"mean {symbol} before the first update is {float(values[name]):.2e}, above {bound:.0e} for "
                f"{config.train.precision}: the teacher's embeddings are not this model's; "
                "remove the teacher cache to have it made anew"
            )
