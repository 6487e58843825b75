"""Runs whose reference pairs are a stream of tars: refusals, a resume, and the identity."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file

from dive_fast.config.schema import ReferenceConfig
from dive_fast.data.open_dataset import open_reference
from dive_fast.data.stream_order import StreamOrder
from dive_fast.distributed import join
from dive_fast.errors import ConfigError, DataError
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.training import loop as train
from dive_fast.training.run_identity import check_resumable, config_identity

COUNT = 27


class KilledError(Exception):
    """Raised where a run is to end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    tiny.write_shards(root / "pairs", COUNT, shard=5)
    tree: dict[str, Any] = {
        "model": {"name": tiny.write_model(root / "model", tiny.FEW_TOKENS)},
        "data": {
            "target": tiny.write_target(root / "target", 16) | {"batch_size": 4, "workers": 0},
            "reference": {"format": "webdataset", "path": str(root / "pairs"), "batch_size": 4, "workers": 1}
            | {"order": "stream", "stream_buffer": 8},
        },
        "objective": {"reference_every": 2},
        "teacher": {"mode": "online"},
        "train": {"epochs": 4, "precision": "fp32", "warmup_steps": 1, "learning_rate": 1e-3, "log_every": 1}
        | {"checkpoint_every": 2},
        "deepspeed": {"gradient_clipping": 0.0},
    }
    (root / "config.json").write_text(json.dumps(tree))
    return root


def config_of(folder: Path, **changes: Any) -> RunConfig:
    tree = json.loads((folder / "config.json").read_text())
    for place, value in changes.items():
        *sections, key = place.split("__")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return RunConfig.model_validate_json(json.dumps(tree))


def run(folder: Path, output: Path, kill_at: int | None = None) -> Any:
    ranks = join()
    Part.backend = "torch"
    log = train.Metrics.log

    def log_until(self: Any, step: int, *values: Any) -> None:
        log(self, step, *values)
        if step == kill_at:
            raise KilledError

    train.Metrics.log = log_until  # type: ignore[method-assign]
    try:
        return train.train(config_of(folder), output, ranks)
    finally:
        train.Metrics.log = log  # type: ignore[method-assign]


def complete_and_resumed(folder: Path) -> list[list[tuple[int, int]]]:
    """A complete run; another one is killed and resumed. Returns this rank's keys of each step of the first."""
    steps: list[list[tuple[int, int]]] = []
    keys_of_steps = StreamOrder.keys_of_steps

    def record(self: StreamOrder, chosen: range) -> Iterator[list[tuple[int, int]]]:
        for keys in keys_of_steps(self, chosen):
            steps.append(keys)
            yield keys

    StreamOrder.keys_of_steps = record  # type: ignore[method-assign]
    run(folder, folder / "complete")
    StreamOrder.keys_of_steps = keys_of_steps  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        run(folder, folder / "resumed", kill_at=11)
    run(folder, folder / "resumed")
    return steps


def test_two_ranks_share_each_epoch_and_a_resumed_run_has_the_same_weights(folder: Path) -> None:
    ranks = run_ranks(2, complete_and_resumed, folder, init=False, timeout=500)
    assert [[len(keys) for keys in steps] for steps in ranks] == [[2] * 8] * 2, "8 steps with a reference half"
    first_epoch = [number for steps in ranks for keys in steps for epoch, number in keys if epoch == 0]
    assert len(first_epoch) == len(set(first_epoch)) == COUNT
    complete, resumed = (load_file(folder / name / "model.safetensors") for name in ("complete", "resumed"))
    assert all(torch.equal(complete[name], resumed[name]) for name in complete)
    before = load_file(folder / "model/open_clip_model.safetensors")
    assert not all(torch.equal(before[name], complete[name]) for name in before)


REFUSED = {
    "cache": ({"teacher__mode": "cache"}, r"teacher\.mode = cache: .*order = stream.*set teacher\.mode=online"),
    "csv": ({"data__reference__format": "csv"}, r"data\.reference\.order = stream reads webdataset tars, not csv"),
    "probe": ({"evaluate__probe": 20}, r"evaluate\.probe = 20: .*set evaluate\.probe=0"),
}
"""Changes of the config, and the message that refuses each."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_pairs_is_refused(folder: Path, name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config_of(folder, **changes)


def test_method_without_a_teacher_needs_no_online_teacher(folder: Path) -> None:
    config_of(folder, teacher__mode="cache", objective__name="flyp_replay")


def test_commands_that_need_all_pairs_refuse_a_stream(folder: Path) -> None:
    section = ReferenceConfig(format="webdataset", path=str(folder / "pairs"), order="stream")
    with pytest.raises(DataError, match=r"data\.reference\.order = stream: only training .*order=indexed"):
        open_reference(section)


def test_changed_buffer_or_number_of_ranks_stops_a_resume(folder: Path) -> None:
    stored = config_identity(config_of(folder))
    with pytest.raises(ConfigError, match=r"data\.reference\.stream_buffer: [^;]*\):"):
        check_resumable(folder, stored, config_identity(config_of(folder, data__reference__stream_buffer=9)))
    one, two = config_identity(config_of(folder)), config_identity(config_of(folder))
    one["data"]["reference"]["stream_ranks"], two["data"]["reference"]["stream_ranks"] = 1, 2
    with pytest.raises(ConfigError, match="its tars are dealt to 1 ranks there, 2 here"):
        check_resumable(folder, one, two)
