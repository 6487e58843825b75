"""Measures the cost of checkpoints to the loop: ``python benchmarks/saves.py --model ViT-B-32 --batch 8``.

Each round has steps without a save; a save with steps until it is complete; a save that the loop waits for; and
DeepSpeed's ``save_checkpoint``, which the loop also waits for. Ratios are within a round.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

from loss_report import REPOSITORY, commit, device_name, slug, write_json
from measure_losses import timed
from steps import Case, make_batches, make_engine, random_model

from dive_fast.checkpoint.saver import Saver
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import TrainConfig
from dive_fast.fault_tolerance.consensus import Votes

STEPS_ALONE = 3


def main() -> None:
    """Measures, prints figures and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "build/benchmarks")
    parser.add_argument(
        "--folder", type=Path, help="folder for checkpoints; default: the system's temporary folder"
    )
    options = parser.parse_args()
    case = Case(options.model, options.batch, "dive_fast")
    engine, batches = make_engine(case, random_model(options.model), zero=1), make_batches(case)[0]

    def step() -> object:
        return engine.step(dataclasses.replace(batches))

    step()
    rounds = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        saver = Saver(engine, folder / "ours", TrainConfig(keep_last=1), RunRecord("saves"))
        numbers = {"best": None, "best_step": 0, "since_best": 0, "select": None}
        for number in range(1, options.rounds + 1):
            alone = statistics.median(timed(step) for _ in range(STEPS_ALONE))
            start = time.perf_counter()
            blocked = timed(lambda number=number: saver.save(2 * number, numbers, {}))  # type: ignore[misc]
            overlapping = []
            agreed = Votes()
            while agreed.committed < 2 * number - 1:
                overlapping.append(timed(step))
                agreed = saver.votes()
                saver.advance(agreed)
            complete = time.perf_counter() - start
            saver.save(2 * number + 1, numbers, {})
            waited = timed(saver.finish)
            deepspeed = timed(lambda: engine.deepspeed.save_checkpoint(str(folder / "deepspeed"), tag="one"))
            size = sum(file.stat().st_size for file in next((folder / "ours").glob("step*")).iterdir())
            rounds.append(
                {
                    "gib": size / 2**30,
                    "step": alone,
                    "blocked": blocked,
                    "extra_step_time": sum(overlapping) - len(overlapping) * alone,
                    "complete": complete,
                    "waiting_save": blocked + waited,
                    "deepspeed": deepspeed,
                }
            )
            print({name: round(value, 3) for name, value in rounds[-1].items()}, flush=True)
            results = {"device": device_name(), "commit": commit(), "case": case._asdict(), "rounds": rounds}
            write_json(options.results / f"{slug(device_name())}-saves.json", results)
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ratio = statistics.median((each["blocked"] + each["extra_step_time"]) / each["deepspeed"] for each in rounds)
    print(medians, f"cost to the loop relative to DeepSpeed's save: {ratio:.2f}")


if __name__ == "__main__":
    main()
