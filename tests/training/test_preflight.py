"""Checks before a run: folders, disk, compilers, packages, shared memory, open files."""

import collections
import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from dive_fast.config.schema import Config, ObjectiveConfig, TeacherConfig
from dive_fast.data import worker_memory
from dive_fast.distributed import Ranks
from dive_fast.errors import UserError
from dive_fast.methods.run_config import RunConfig
from dive_fast.training import preflight

ALONE = Ranks(0, 1, torch.device("cpu"))
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_config(tmp_path_factory.mktemp("run"))


def changed(tree: dict[str, Any], **values: Any) -> Config:
    """The config with other values, by dotted key."""
    copy = json.loads(json.dumps(tree))
    for place, value in values.items():
        *sections, key = place.split(".")
        section = copy
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return RunConfig.model_validate_json(json.dumps(copy))


def check_compiler(config: Config, on_gpu: bool) -> None:
    preflight.check_compiler(config.train, config.deepspeed, on_gpu)


def check_refused(message: str, config: Config, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        preflight.check_environment(config, folder, ALONE)
    assert message in str(caught.value)


def test_environment_check_leaves_no_files(tree: dict[str, Any], tmp_path: Path) -> None:
    preflight.check_environment(changed(tree), tmp_path / "run", ALONE)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_folder_that_is_a_file_is_refused(tree: dict[str, Any], tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    check_refused(f"train.output = {tmp_path}/{place}: cannot write there", changed(tree), tmp_path / place)
    cache = changed(tree, **{"teacher.path": str(tmp_path / place / "cache")})
    check_refused("teacher.path = ", cache, tmp_path / "run")


@pytest.mark.parametrize("below", ["", "best", "checkpoints/step00000001"])
@pytest.mark.parametrize("key", ["model.name", "model.pretrained", "teacher.path"])
def test_input_among_the_run_outputs_is_refused(
    tree: dict[str, Any], tmp_path: Path, key: str, below: str
) -> None:
    run = tmp_path / "run"
    (run / below).mkdir(parents=True)
    (run / below / "model.safetensors").touch()
    named = {"model.name": f"local-dir:{run / below}", "model.pretrained": str(run / below / "model.safetensors")}
    others = {"model.name": "ViT-B-32"} if key == "model.pretrained" else {}
    config = changed(tree, **others, **{key: named.get(key, str(run / below))})
    with pytest.raises(UserError, match=f"{key} = .* is where the run itself writes"):
        preflight.check_inputs(config, run)
    preflight.check_inputs(config, tmp_path / "another")


def test_cache_folder_with_other_files_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    config = changed(tree, **{"teacher.path": str(tmp_path / "notes")})
    preflight.check_environment(config, tmp_path / "run", ALONE)
    (tmp_path / "notes/mine.txt").touch()
    check_refused("notes is not empty, and not a teacher cache", config, tmp_path / "run")


def test_folder_on_read_only_disk_is_refused(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> Any:
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(preflight.tempfile, "NamedTemporaryFile", full)
    check_refused("the file system is read-only", changed(tree), tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"train.compile": True}, "train.compile needs a compiler"),
        (
            {"deepspeed.zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer needs a compiler",
        ),
    ],
)
def test_missing_compiler_is_refused_only_where_needed(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], option: str
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    check_compiler(changed(tree, **values), on_gpu=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_refused(option, changed(tree, **values), tmp_path / "run")
    check_compiler(changed(tree), on_gpu=False)
    with pytest.raises(UserError, match=r"Triton.*gcc or clang or cc is not found"):
        check_compiler(changed(tree), on_gpu=True)


def test_unwritable_folder_for_compiled_code_is_refused(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with pytest.raises(UserError, match=r"home/\.triton/cache: cannot write there.*set TRITON_CACHE_DIR"):
        check_compiler(changed(tree), on_gpu=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    check_compiler(changed(tree), on_gpu=True)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    check_compiler(changed(tree), on_gpu=True)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    with pytest.raises(UserError, match="set HOME, or TRITON_CACHE_DIR"):
        check_compiler(changed(tree), on_gpu=True)


def test_open_files_limit_is_raised_or_refused(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    limits, calls = (64, 4096), []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, value: calls.append(value))
    many = changed(tree, **{"data.target.workers": 8})
    preflight.check_open_files(many.data, many.evaluate)
    assert calls
    assert 100 < calls[0][0] <= 4096
    limits = (64, 64)
    with pytest.raises(UserError, match=r"open files is 64, 8 loader workers need at least 124.*ulimit -n"):
        preflight.check_open_files(many.data, many.evaluate)


@pytest.mark.parametrize(("loader", "memory"), [("plain", "available_memory"), ("dali", "free_shared_memory")])
def test_memory_too_small_for_loaders_is_refused(
    tree: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    loader: str,
    memory: str,
) -> None:
    config = changed(
        tree, **{"data.target.workers": 2, "data.target.batch_size": 16, "data.target.loader": loader}
    )
    # 16 images: pixels of 32 x 32, two batches more than each process has ahead; or files, one batch more.
    batch = worker_memory.batch_bytes(loader, 16, (32, 32))
    one, two = (max(worker_memory.loader_bytes(batch, 2, ahead)) for ahead in (1, 2))
    assert (one, two) == (
        (4 * 16 * 3 * 32 * 32, 6 * 16 * 3 * 32 * 32) if loader == "plain" else (3 * batch.shared, 5 * batch.shared)
    )
    shares = worker_memory.LOADERS
    for free, warns in ((one, True), (shares * two - 1, True), (shares * two, False)):
        caplog.clear()
        monkeypatch.setattr(worker_memory, memory, lambda free=free: free)
        preflight.check_loader_memory(config, (32, 32), ALONE)
        assert ("1 batch ahead instead of 2" in caplog.text) == warns
    monkeypatch.setattr(worker_memory, memory, lambda: one - 1)
    preflight.check_loader_memory(changed(tree), (32, 32), ALONE)  # without workers
    with pytest.raises(UserError, match=r"loaders keep at least .*are free: .*use fewer data.target.workers"):
        preflight.check_loader_memory(config, (32, 32), ALONE)
    # Each rank has half of the batch, but both ranks share the memory.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(worker_memory, memory, lambda: one)
    preflight.check_loader_memory(config, (32, 32), Ranks(0, 2, torch.device("cpu")))


def test_evaluation_counts_in_the_memory_of_loaders(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"val": {"format": "folder", "path": "val"}}
    config = changed(tree, **{"evaluate.sets": sets, "evaluate.workers": 1, "evaluate.batch_size": 8})
    batch = worker_memory.batch_bytes("plain", 8, (32, 32))
    monkeypatch.setattr(worker_memory, "available_memory", lambda: 3 * batch.pixels - 1)
    with pytest.raises(UserError, match=r"evaluate\.workers"):
        preflight.check_loader_memory(config, (32, 32), ALONE)


def test_small_disk_is_refused_and_tight_disk_warns(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    towers: Any = SimpleNamespace(width=24, parameters=lambda: [torch.empty(2**18)])  # 1 MiB of weights
    config = changed(tree)
    cache = 24 * 2 * 24 * 4
    least = 4 * 2**20 + cache
    for free, outcome in ((least - 1, "refused"), (least, "warned"), (2**30, "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(2**40, 0, free))
        caplog.clear()
        if outcome == "refused":
            with pytest.raises(UserError, match=r"the run needs at least 4.0 MiB"):
                preflight.check_disk(config, tmp_path, towers, 24)
        else:
            preflight.check_disk(config, tmp_path, towers, 24)
        assert ("train.keep_last" in caplog.text) == (outcome == "warned")
    # Each checkpoint and the exported model have the weights of a moving teacher too.
    moving = config.model_copy(update={"objective": ObjectiveConfig(name="tracer"), "teacher": TeacherConfig()})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 6 * 2**20 - 1))
    with pytest.raises(UserError, match=r"the run needs at least 6.0 MiB"):
        preflight.check_disk(moving, tmp_path, towers, 24)
    # DiGraP's checkpoints have the previous deviations.
    for name, size in (("digrap", 5), ("spd", 4)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, size=size: Usage(2**40, 0, size * 2**20 - 1))
        with pytest.raises(UserError, match=rf"the run needs at least {size}.0 MiB"):
            preflight.check_disk(changed(tree, **{"projection.name": name}), tmp_path, towers, 24)
    # So they have averaged weights, unless those are the model's.
    for values, size in (({"train.ema": 0.9}, 6), ({"train.ema": 0.9, "train.export_ema": True}, 5)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, size=size: Usage(2**40, 0, size * 2**20 - 1))
        with pytest.raises(UserError, match=rf"the run needs at least {size}.0 MiB"):
            preflight.check_disk(changed(tree, **values), tmp_path, towers, 24)
