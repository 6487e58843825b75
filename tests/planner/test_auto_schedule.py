"""The schedule chosen for ``train.schedule = auto``, and GPUs recognized by their names."""

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
from dive_fast.methods import registry
from dive_fast.planner import auto_schedule as schedule
from dive_fast.planner import gpu_specs as gpus
from dive_fast.planner import plan, simulate
from dive_fast.planner.gpu_specs import GPUS, gpu_key
from dive_fast.planner.plan import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, SMALL, preprocess={"size": 64})
    return path


def cached(plan_run: Any) -> Any:
    """Caches plans, which take seconds."""
    plans: dict[tuple[str, int], Plan] = {}

    def cached_plan_run(config: Config, ranks: int) -> Plan:
        key = config.model_dump_json(), ranks
        if key not in plans:
            plans[key] = plan_run(config, ranks)
        return plans[key]

    return cached_plan_run


def choices(folder: Path) -> dict[str, str]:
    config = small_config(folder, **{"train.schedule": "auto"})
    simulate.plan_run = cached(simulate.plan_run)  # only in this forked process
    needs = {
        name: simulate.plan_run(schedule.with_schedule(config, name), 1).needed_memory_bytes
        for name in ("sequential", "joint")
    }
    assert needs["sequential"] < needs["joint"]
    chosen = {"waits for its host": schedule.choose(config, 1, "h200")}
    tight = GPUS["h200"]._replace(memory=needs["joint"] - 1)
    with unittest.mock.patch.dict(gpus.GPUS, small=tight):
        chosen["does not fit"] = schedule.choose(config, 1, "small")
    # Enough pairs that the traffic of weights, which a joint graph halves, is a small share.
    many = {"data.target.batch_size": 512, "data.reference.batch_size": 512}
    with unittest.mock.patch.multiple(plan, LAUNCH_SECONDS=0.0, TRITON_SECONDS=0.0):
        large = small_config(folder, **{"train.schedule": "auto"}, **many)
        chosen["computes"] = schedule.choose(large, 1, "h200")
    flyp = small_config(folder, **{"train.schedule": "auto", "objective.name": "flyp"})
    return chosen | {"has one half": schedule.choose(flyp, 1, "h200")}


def test_joint_chosen_if_it_fits_and_gpu_waits_for_host(folder: Path) -> None:
    assert run_ranks(1, choices, folder, init=False)[0] == {
        "waits for its host": "joint",
        "does not fit": "sequential",
        "computes": "sequential",
        "has one half": "sequential",
    }


def chosen_in_subprocess(folder: Path) -> str:
    """The choice of a process that has joined a process group and cannot plan itself."""
    return schedule.choose_in_subprocess(small_config(folder, **{"train.schedule": "auto"}), 2, "h200")


@pytest.mark.slow
def test_choose_in_subprocess_works_in_process_group(folder: Path) -> None:
    assert run_ranks(2, chosen_in_subprocess, folder) == ["joint", "joint"]


def test_resolve_keeps_other_schedules_and_defaults_to_sequential(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    config = small_config(folder, **{"train.schedule": "joint"})
    assert schedule.resolve(config, alone) is config
    config = small_config(folder, **{"train.schedule": "auto"})
    assert schedule.resolve(config, alone).train.schedule == "sequential"
    assert "no figures for this device" in capsys.readouterr().out


@pytest.mark.slow
def test_choose_in_subprocess_reports_planning_error(folder: Path) -> None:
    config = small_config(folder, **{"train.schedule": "auto", "data.target.batch_size": 15})
    with pytest.raises(ConfigError, match=r"(?s)planning failed; name the schedule.*not divisible by 2 ranks"):
        schedule.choose_in_subprocess(config, 2, "h200")


def test_choose_in_subprocess_refuses_methods_from_outside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_shipped", lambda: registry.Table({}, {}, {}))
    with pytest.raises(
        ConfigError, match=r"^train\.schedule = auto: .* added by registry\.add; name the schedule: seq"
    ):
        schedule.choose_in_subprocess(small_config(folder, **{"train.schedule": "auto"}), 2, "h200")


def test_gpu_key_of_driver_names() -> None:
    assert gpu_key("NVIDIA H100 80GB HBM3") == "h100"
    assert gpu_key("NVIDIA H200") == "h200"
    assert gpu_key("NVIDIA H200", 150 * 10**9) == "h200"


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
def test_gpu_key_is_none_for_slices_and_similar_names(name: str, memory: int | None) -> None:
    assert gpu_key(name, memory) is None
