"""The schedule that is predicted to be the better one."""

import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from small_configs import SMALL, small_config

from dive_fast.config.schema import Config
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.planner import auto_schedule as schedule
from dive_fast.planner import gpu_specs as gpus
from dive_fast.planner import plan, simulate
from dive_fast.planner.gpu_specs import GPUS, sold_as
from dive_fast.planner.plan import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, SMALL, preprocess={"size": 64})
    return path


def remembering(planning: Any) -> Any:
    """A plan takes seconds."""
    known: dict[tuple[str, int], Plan] = {}

    def planned(config: Config, ranks: int) -> Plan:
        key = config.model_dump_json(), ranks
        if key not in known:
            known[key] = planning(config, ranks)
        return known[key]

    return planned


def choices(folder: Path) -> dict[str, str]:
    config = small_config(folder, **{"train.schedule": "auto"})
    simulate.plan_run = remembering(simulate.plan_run)  # in this process alone
    needs = {
        name: simulate.plan_run(schedule.with_schedule(config, name), 1).needed_memory_bytes
        for name in ("sequential", "joint")
    }
    assert needs["sequential"] < needs["joint"]
    found = {"waits for its host": schedule.choose(config, 1, "h200")}
    tight = GPUS["h200"]._replace(memory=needs["joint"] - 1)
    with unittest.mock.patch.dict(gpus.GPUS, small=tight):
        found["does not fit"] = schedule.choose(config, 1, "small")
    with unittest.mock.patch.object(plan, "LAUNCH_SECONDS", 0.0):
        found["computes"] = schedule.choose(config, 1, "h200")
    flyp = small_config(folder, **{"train.schedule": "auto", "objective.name": "flyp"})
    return found | {"has one half": schedule.choose(flyp, 1, "h200")}


def test_joint_where_it_fits_and_the_gpu_waits_for_its_host(folder: Path) -> None:
    assert run_ranks(1, choices, folder, init=False)[0] == {
        "waits for its host": "joint",
        "does not fit": "sequential",
        "computes": "sequential",
        "has one half": "sequential",
    }


def asked(folder: Path) -> str:
    """While this process is in a group of ranks, which could not plan."""
    return schedule.ask(small_config(folder, **{"train.schedule": "auto"}), 2, "h200")


def test_ranks_of_a_run_ask_another_process(folder: Path) -> None:
    assert run_ranks(2, asked, folder) == ["joint", "joint"]


def test_other_schedules_stay_and_a_device_without_figures_gets_sequential(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    config = small_config(folder, **{"train.schedule": "joint"})
    assert schedule.resolve(config, alone) is config
    config = small_config(folder, **{"train.schedule": "auto"})
    assert schedule.resolve(config, alone).train.schedule == "sequential"
    assert "no figures of this device" in capsys.readouterr().out


def test_what_cannot_be_planned_is_told(folder: Path) -> None:
    config = small_config(folder, **{"train.schedule": "auto", "data.target.batch_size": 15})
    with pytest.raises(ConfigError, match=r"(?s)planning failed; name the schedule.*not divisible by 2 ranks"):
        schedule.ask(config, 2, "h200")


def test_gpus_are_known_by_their_drivers_names() -> None:
    assert sold_as("NVIDIA H100 80GB HBM3") == "h100"
    assert sold_as("NVIDIA H200") == "h200"
    assert sold_as("NVIDIA H200", 150 * 10**9) == "h200"


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GH200 144G HBM3e", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA H200", 18 * 10**9),
        ("NVIDIA H20", None),
    ],
)
def test_slices_and_namesakes_are_not_whole_gpus(name: str, memory: int | None) -> None:
    assert sold_as(name, memory) is None
