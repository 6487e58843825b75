"""Kills a run at random, starts it again, until it ends; compares it with one that was left alone; and again.

``python tests/faults/soak.py --hours 12``. Each round draws a variant of the run, then for each start a signal,
whom it is sent to and when. It stops at the first difference, and leaves that round's folder.
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
    """Parses, soaks, reports; 1 at a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, until = random.Random(options.seed), time.monotonic() + 3600 * options.hours
    hurt: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    rounds = 0
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    tree = config(folder)
    tree["train"] |= {"epochs": EPOCHS, "checkpoint_every": 7, "rank_timeout": 20.0}
    while time.monotonic() < until:
        ranks, stage = draw.choice((1, 2)), draw.choice(STAGES)
        overrides = (f"deepspeed.zero_optimization.stage={stage}", *draw.choice(VARIANTS))
        alone = Job(folder / f"alone{rounds}", tree)
        outcome = alone.go(ranks=ranks, overrides=overrides)
        assert outcome.codes == [0] * ranks, outcome.said
        job = Job(folder / f"hurt{rounds}", tree)
        starts = 0
        while True:
            starts += 1
            job.start(ranks=ranks, overrides=overrides)
            # At times before the run can end, at times after.
            time.sleep(draw.uniform(0.5, outcome.seconds))
            number, rank = draw.choice(SIGNALS), draw.randrange(ranks)
            sent = job.kill(rank, number)
            # A rank that is frozen is for the others to notice; it does not end by itself.
            ended = job.wait(ranks=None if number != signal.SIGSTOP else tuple(set(range(ranks)) - {rank}))
            codes.update(ended.codes)
            if ended.codes == [0] * ranks:
                break
            assert sent, ended.said
            hurt[number.name] += 1
            known = {0, STOPPED, LOST, 1, 130, -number, -signal.SIGKILL}
            assert set(ended.codes) <= known, ended.said
        (weights, lines), (expected, expected_lines) = job.result(), alone.result()
        same = lines == expected_lines and all(torch.equal(weights[name], expected[name]) for name in expected)
        rounds += 1
        print(
            f"round {rounds}: {ranks} ranks, {' '.join(overrides)}: {starts} starts,",
            "same" if same else "DIFFERS",
        )
        if not same:
            print(folder)
            return 1
        for done in (alone, job):
            shutil.rmtree(done.folder)
    shutil.rmtree(folder)
    print(f"{rounds} runs, {sum(hurt.values())} times hurt {dict(hurt)}, exit codes {dict(codes)}: all the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
