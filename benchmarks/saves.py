"""What a checkpoint costs the loop: ``python benchmarks/saves.py --model ViT-B-32 --batch 8``.

Rounds of: steps alone; a save, with steps until it is whole; a save that the loop waits for; DeepSpeed's
``save_checkpoint``, which the loop waits for as well. Ratios are those within a round.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

from loss_report import REPOSITORY, commit, device_name, slug, write_json
from measure_losses import timed
from steps import Case, make_engine, make_inputs, random_model

from dive_fast.checkpoint.saver import Saver
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import TrainConfig
from dive_fast.fault_tolerance.consensus import Votes

STEPS_ALONE = 3


def main() -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "build/benchmarks")
    parser.add_argument(
        "--folder", type=Path, help="whose disk is written to; default: the system's temporary one"
    )
    options = parser.parse_args()
    case = Case(options.model, options.batch, "dive_fast")
    engine, batches = make_engine(case, random_model(options.model), make_inputs(*case.sizes), zero=1)

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
            begun = time.perf_counter()
            held = timed(lambda number=number: saver.save(2 * number, numbers, {}))  # type: ignore[misc]
            beside = []
            agreed = Votes()
            while agreed.committed < 2 * number - 1:
                beside.append(timed(step))
                agreed = saver.votes()
                saver.advance(agreed)
            whole = time.perf_counter() - begun
            saver.save(2 * number + 1, numbers, {})
            waited = held + timed(saver.finish)
            deepspeed = timed(lambda: engine.deepspeed.save_checkpoint(str(folder / "deepspeed"), tag="one"))
            size = sum(file.stat().st_size for file in next((folder / "ours").glob("step*")).iterdir())
            rounds.append(
                {
                    "gib": size / 2**30,
                    "step": alone,
                    "held": held,
                    "extra_of_steps_beside": sum(beside) - len(beside) * alone,
                    "whole": whole,
                    "waited_for": waited,
                    "deepspeed": deepspeed,
                }
            )
            print({name: round(value, 3) for name, value in rounds[-1].items()}, flush=True)
            found = {"device": device_name(), "commit": commit(), "case": case._asdict(), "rounds": rounds}
            write_json(options.results / f"{slug(device_name())}-saves.json", found)
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ratio = statistics.median(
        (each["held"] + each["extra_of_steps_beside"]) / each["deepspeed"] for each in rounds
    )
    print(medians, f"cost to the loop over that of DeepSpeed's save: {ratio:.2f}")


if __name__ == "__main__":
    main()
