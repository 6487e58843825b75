"""Soak test: kills and restarts runs at random, and compares their results with those of undisturbed runs.

``python tests/faults/soak.py --hours 12``. Each round draws a variant of the run, then for each start a signal,
its receiver and its time. The test stops at the first difference and keeps the folder of that round.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402 - after the path is known
from jobs import Job, config  # noqa: E402

from dive_fast.fault_tolerance.heartbeat import LOST, STOPPED  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGSTOP)
EPOCHS = 20
STAGES = (0, 1, 2, 3)
VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("teacher.mode=online",),
    ("train.micro_batch_size=3",),
    ("train.precision=fp16",),
    ("data.target.workers=1",),
    ("objective.reference_every=2",),
    ("train.schedule=joint",),
)


def main() -> int:
    """Parses the options and runs rounds until the time is up; returns 1 at a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, deadline = random.Random(options.seed), time.monotonic() + 3600 * options.hours
    signals: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    rounds = 0
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    tree = config(folder)
    tree["train"] |= {"epochs": EPOCHS, "checkpoint_every": 7, "rank_timeout": 20.0}
    while time.monotonic() < deadline:
        ranks, stage = draw.choice((1, 2)), draw.choice(STAGES)
        overrides = (f"deepspeed.zero_optimization.stage={stage}", *draw.choice(VARIANTS))
        undisturbed = Job(folder / f"undisturbed{rounds}", tree)
        outcome = undisturbed.go(ranks=ranks, overrides=overrides)
        assert outcome.codes == [0] * ranks, outcome.output
        job = Job(folder / f"disturbed{rounds}", tree)
        starts = 0
        while True:
            starts += 1
            job.start(ranks=ranks, overrides=overrides)
            # Sometimes before the run can end, sometimes after.
            time.sleep(draw.uniform(0.5, outcome.seconds))
            number, rank = draw.choice(SIGNALS), draw.randrange(ranks)
            sent = job.kill(rank, number)
            # A frozen rank does not end by itself; the others have to detect it.
            ended = job.wait(ranks=None if number != signal.SIGSTOP else tuple(set(range(ranks)) - {rank}))
            codes.update(ended.codes)
            if ended.codes == [0] * ranks:
                break
            assert sent, ended.output
            signals[number.name] += 1
            known = {0, STOPPED, LOST, 1, 130, -number, -signal.SIGKILL}
            assert set(ended.codes) <= known, ended.output
        (weights, lines), (expected, expected_lines) = job.result(), undisturbed.result()
        same = lines == expected_lines and all(torch.equal(weights[name], expected[name]) for name in expected)
        rounds += 1
        print(
            f"round {rounds}: {ranks} ranks, {' '.join(overrides)}: {starts} starts,",
            "same" if same else "DIFFERS",
        )
        if not same:
            print(folder)
            return 1
        for done in (undisturbed, job):
            shutil.rmtree(done.folder)
    shutil.rmtree(folder)
    print(f"{rounds} runs, {signals.total()} signals {dict(signals)}, exit codes {dict(codes)}: all the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
