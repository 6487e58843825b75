"""The loop: batches in, steps, metrics, checkpoints, and at the end a model that open_clip loads."""

from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import load_file

from dive_fast import checkpoint
from dive_fast.config import Config, ConfigError
from dive_fast.engine import AUTOCAST
from dive_fast.evaluate.zero_shot import evaluate
from dive_fast.metrics import DIFFERENCE_VECTORS, Metrics
from dive_fast.ranks import Ranks
from dive_fast.run import batches, build
from dive_fast.teacher.audit import allowed
from dive_fast.towers import Towers, create, tokenizer_of
from dive_fast.trace import span, tracing

NOISE_FLOOR = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
"""Largest mean |u| and |v| allowed before the first update, where the tuned model is the frozen one and only the
rounding of the forward pass is left (measured: 1.2e-3 in fp16, 9.1e-3 in bf16): more means a wrong cache."""


def train(config: Config, folder: Path, ranks: Ranks) -> dict[str, float]:
    """Runs a config from its newest checkpoint, or its start, to its end; returns the final metrics.

    Leaves ``metrics.jsonl``, ``config.json``, ``checkpoints/`` and ``model.safetensors`` in ``folder``.

    Raises:
        ConfigError, DataError: the user's to mend; the message says how.
    """
    run = build(config, folder, ranks)
    engine, options = run.engine, config.train
    found = checkpoint.find(options.resume, folder / "checkpoints")
    first_step = checkpoint.load(engine, found) if found is not None else 0
    steps = range(first_step, run.total_steps)
    ahead = batches(run, steps)
    metrics = Metrics(run, first_step, ahead)
    with closing(ahead), tracing(options.trace_steps, folder / "trace.json.gz", ranks) as traced:
        for step, given in zip(steps, ahead, strict=True):
            if given.reference is not None and given.teacher is None and run.teacher is not None:
                with span("teacher"):
                    given.teacher = run.teacher(given.reference)
            learning_rate = engine.learning_rate
            values = engine.step(given)
            if step == 0:
                _check_noise_floor(values, config)
            metrics.log(step + 1, values, learning_rate)
            traced()
            is_last = step + 1 == run.total_steps
            if options.checkpoint_every and (step + 1) % options.checkpoint_every == 0 and not is_last:
                metrics.flush()
                checkpoint.save(engine, folder / "checkpoints", step + 1, options.keep_checkpoints)
    metrics.flush()
    if len(steps) > 0:
        checkpoint.save(engine, folder / "checkpoints", run.total_steps, options.keep_checkpoints)
    exported = folder / "model.safetensors"
    checkpoint.export(engine, exported)
    accuracies = evaluate(_tuned(config, exported, ranks), tokenizer_of(config.model), config.evaluate, ranks)
    return metrics.close({f"accuracy/{name}": value for name, value in accuracies.items()})


def _tuned(config: Config, exported: Path, ranks: Ranks) -> Towers:
    """The exported model, whole on every rank: under ZeRO-3 the student's own towers run only inside DeepSpeed."""
    tuned = create(config.model).load_exported(load_file(exported)).to(ranks.device).eval()
    tuned.autocast = AUTOCAST[config.train.precision]
    return tuned


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
