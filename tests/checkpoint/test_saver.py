"""Saving and loading: a saved state comes back bit for bit, failures leave older checkpoints unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import RUN, VALIDATION, make_engine, write_checkpoint

from dive_fast.checkpoint import manifest, saver
from dive_fast.checkpoint.resume import find_checkpoint, load_checkpoint
from dive_fast.checkpoint.saver import SaveError, Saver
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import TrainConfig
from dive_fast.errors import ConfigError
from dive_fast.fault_tolerance.consensus import Votes

METRICS = {"loss": 0.25}


def make_saver(engine: Any, folder: Path, **options: Any) -> Saver:
    return Saver(engine, folder, TrainConfig(**options), RunRecord(RUN, 9, {"train": {"seed": 0}}))


def save(writer: Saver, *steps: int, best_step: int = 0) -> None:
    for step in steps:
        writer.save(step, VALIDATION | {"best_step": best_step}, METRICS)
        writer.finish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saved_state_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    engine, folder = make_engine(updates=3), tmp_path / "checkpoints"
    engine.scale.skipped_steps += 2
    save(make_saver(engine, folder), 3)
    random = torch.rand(2)
    other = make_engine(seed=1)
    path = find_checkpoint("auto", folder, other.ranks)
    assert path is not None
    numbers = load_checkpoint(other, path)
    assert torch.equal(torch.rand(2), random)  # the state of the generator is restored too
    assert (numbers["step"], numbers["updates"], numbers["metrics"]) == (3, 3, METRICS)
    assert manifest.read_identity(path) == {"train": {"seed": 0}}
    for name, tensor in engine.towers.state_dict().items():
        assert torch.equal(other.towers.state_dict()[name], tensor), name
    for key in ("exp_avg", "exp_avg_sq", "step"):
        states = [one.deepspeed.optimizer.state[one.towers.weight][key] for one in (engine, other)]
        assert torch.equal(*states), key
    assert torch.equal(other.method.state()["average_vector"], engine.method.state()["average_vector"])
    assert other.scale.skipped_steps == 2
    assert other.steps == [3]


def test_next_update_after_loading_is_equal(tmp_path: Path) -> None:
    engine, other = make_engine(updates=3), make_engine(seed=1)
    save(make_saver(engine, tmp_path), 3)
    load_checkpoint(other, manifest.checkpoint_path(tmp_path, 3))
    for one in (engine, other):
        one.towers.weight.grad = torch.ones(4, 3)
        one.deepspeed.optimizer.step()
    assert torch.equal(engine.towers.weight, other.towers.weight)


def test_snapshot_does_not_follow_later_updates(tmp_path: Path) -> None:
    engine = make_engine(updates=1)
    before = engine.towers.weight.detach().clone()
    writer = make_saver(engine, tmp_path)
    writer.save(1, VALIDATION, METRICS)
    with torch.no_grad():
        engine.towers.weight.add_(1.0)
    writer.finish()
    stored = manifest.Tensors(manifest.checkpoint_path(tmp_path, 1))
    assert torch.equal(stored.read("weights", "weight", torch.device("cpu")), before)


def test_load_refuses_other_parameters(tmp_path: Path) -> None:
    save(make_saver(make_engine(), tmp_path), 1)
    other = make_engine()
    other.towers.fixed.requires_grad_()
    with pytest.raises(ConfigError, match=r"other parameters are tuned: fixed is \(2,\) here and missing in"):
        load_checkpoint(other, manifest.checkpoint_path(tmp_path, 1))
    other = make_engine()
    other.method.state()["more"] = torch.zeros(1)
    with pytest.raises(ConfigError, match="belongs to another objective"):
        load_checkpoint(other, manifest.checkpoint_path(tmp_path, 1))


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    save(make_saver(make_engine(), tmp_path, keep_last=2, keep_best=True), 1, 2, 3, 4, 5, best_step=2)
    assert names(tmp_path) == ["latest", "step00000002", "step00000004", "step00000005"]
    assert (tmp_path / "latest").read_text() == "step00000005\n"
    save(make_saver(make_engine(), tmp_path, keep_last=1, keep_best=False), 6, best_step=2)
    assert names(tmp_path) == ["latest", "step00000006"]


def test_retention_removes_other_runs_but_not_the_start(tmp_path: Path) -> None:
    start, _ = write_checkpoint(tmp_path, 1, run="older"), write_checkpoint(tmp_path, 7, run="older")
    unreadable = write_checkpoint(tmp_path, 5, run="older")
    (unreadable / "trainer.json").write_text("{")
    record = RunRecord(RUN, start=start.resolve())
    save(Saver(make_engine(), tmp_path, TrainConfig(keep_last=1), record), 2)
    assert names(tmp_path) == ["latest", "step00000001", "step00000002", "step00000005"]


def test_unfinished_checkpoints_are_removed_at_the_start(tmp_path: Path) -> None:
    for name in (".step00000002.partial", ".step00000001.removed", "other"):
        (tmp_path / name).mkdir()
    make_saver(make_engine(), tmp_path)
    assert names(tmp_path) == ["other"]


def test_saved_step_may_be_saved_again(tmp_path: Path) -> None:
    writer = make_saver(make_engine(), tmp_path)
    save(writer, 2, 2)
    assert names(tmp_path) == ["latest", "step00000002"]
    assert manifest.is_complete(tmp_path / "step00000002")
    assert writer.newest == 2


def test_votes_and_decisions_complete_a_save(tmp_path: Path) -> None:
    writer = make_saver(make_engine(), tmp_path)
    assert writer.votes() == Votes()
    writer.save(2, VALIDATION, METRICS)
    running = writer._in_progress
    assert running is not None
    running.join()
    votes = writer.votes()
    assert votes == Votes(unwritten=-1)
    assert not manifest.list_checkpoints(tmp_path)
    writer.advance(Votes())  # an older decision starts nothing
    assert not running.is_being_committed
    writer.advance(votes)
    running.join()
    assert writer.votes() == Votes(unwritten=-1, committed=1)
    assert writer.newest is None
    writer.advance(writer.votes())
    assert writer.newest == 2
    assert [path.name for path in manifest.list_checkpoints(tmp_path)] == ["step00000002"]
    assert writer.votes() == Votes(unwritten=-1, committed=1)


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_failed_save_is_voted_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = make_saver(make_engine(), tmp_path)
    save(writer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "save_file", full_disk)
        writer.save(2, VALIDATION, METRICS)
        running = writer._in_progress
        assert running is not None
        with pytest.raises(OSError, match="No space left"):
            running.join()
    votes = writer.votes()
    assert votes == Votes(failed=2, unwritten=-1)
    writer.advance(votes)
    line = capsys.readouterr().out
    assert line.startswith("warning: rank 0 cannot write checkpoint ")
    assert line.endswith("training continues, as train.on_save_error says\n")
    assert names(tmp_path) == ["latest", "step00000001"]
    assert writer.newest == 1
    save(writer, 3)
    assert writer.newest == 3


@pytest.mark.parametrize(("options", "required"), [({"on_save_error": "stop"}, False), ({}, True)])
def test_failed_save_raises_if_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], required: bool
) -> None:
    writer = make_saver(make_engine(), tmp_path, **options)
    monkeypatch.setattr(saver, "save_file", full_disk)
    writer.save(2, VALIDATION, METRICS, required=required)
    with pytest.raises(SaveError, match=r"rank 0 cannot write checkpoint .*No space left"):
        writer.finish(required=required)
    assert names(tmp_path) == []


def test_failure_before_writing_fails_the_save(tmp_path: Path) -> None:
    writer = make_saver(make_engine(), tmp_path)
    calls = []
    writer.save(1, VALIDATION, METRICS, before_write=lambda: calls.append(names(tmp_path)))
    writer.finish()
    assert calls == [[]]
    with pytest.raises(SaveError, match="No space left"):
        writer.save(2, VALIDATION, METRICS, before_write=full_disk, required=True)
    assert names(tmp_path) == ["latest", "step00000001"]


def test_manifest_lists_the_files_of_the_rank(tmp_path: Path) -> None:
    save(make_saver(make_engine(), tmp_path), 1)
    path = tmp_path / "step00000001"
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(files) == ["identity.json", "rank00000.safetensors", "trainer.json"]
    assert names(path) == sorted([*files, "manifest.json"])
