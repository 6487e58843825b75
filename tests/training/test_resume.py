"""A run folder belongs to one run: changed settings are reported or refused, ``never`` discards the older run."""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from test_trackers import ALONE, wandb_exits, wandb_history, wandb_segments

from dive_fast.checkpoint import lineage, saver
from dive_fast.checkpoint import manifest as checkpoint
from dive_fast.config.schema import EvaluateConfig, ModelConfig
from dive_fast.distributed import Ranks, join
from dive_fast.errors import UserError
from dive_fast.evaluation.zero_shot import Measured
from dive_fast.identity import Identity
from dive_fast.locks import folder_lock
from dive_fast.methods import registry
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.training import guard_rails, run_folder, run_identity
from dive_fast.training import loop as train
from dive_fast.training.run_evaluation import Results, RunEvaluation

STEPS = 3


class KilledError(BaseException):
    """Ends a run at once."""


def changed(tree: dict[str, Any], *overrides: tuple[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(tree))
    for dotted, value in overrides:
        *sections, key = dotted.split(".")
        section = copy
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return copy


class Folder:
    """A run folder in which this process starts runs."""

    def __init__(self, ranks: Ranks, tree: dict[str, Any], path: Path) -> None:
        self.ranks, self.tree, self.path = ranks, tree, path

    def start(self, *overrides: tuple[str, Any], kill_at: int | None = None) -> str:
        """Trains; returns the output and the error. ``kill_at`` kills the run after that many steps."""
        config = RunConfig.model_validate_json(json.dumps(changed(self.tree, *overrides)))
        printed, log = io.StringIO(), train.Metrics.log
        handler = logging.StreamHandler(printed)

        def log_until(metrics: train.Metrics, step: int, *values: Any) -> None:
            log(metrics, step, *values)
            if step == kill_at:
                raise KilledError

        logging.getLogger("dive_fast").addHandler(handler)
        train.Metrics.log = log_until  # type: ignore[method-assign]
        try:
            with contextlib.redirect_stdout(printed):
                train.train(config, self.path, self.ranks)
        except UserError as error:
            printed.write(f"error: {error}")
        except KilledError:
            printed.write("killed")
        finally:
            train.Metrics.log = log  # type: ignore[method-assign]
            logging.getLogger("dive_fast").removeHandler(handler)
        return printed.getvalue()

    def contents(self) -> dict[str, bytes]:
        """Contents of all files of the run, except the lock."""
        files = (path for path in self.path.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path.relative_to(self.path)): path.read_bytes() for path in files}

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def copy(self, name: str) -> "Folder":
        shutil.copytree(self.path, self.path.with_name(name))
        return Folder(self.ranks, self.tree, self.path.with_name(name))


REFUSED: dict[str, Any] = {
    "train.learning_rate": 0.5,
    "train.seed": 7,
    "train.weight_decay": 0.2,
    "train.decay_all_parameters": False,
    "train.betas": [0.8, 0.999],
    "train.warmup_steps": 2,
    "train.precision": "bf16",
    "train.ema": 0.9,
    "objective.name": "vanilla_ft",
    "data.target.batch_size": 12,
    "data.target.text_length": 20,
    "deepspeed.gradient_clipping": 1.0,
}
"""Keys of the config that change the result, with another value."""
OTHER_FILES = {
    "target": "data.target",  # with "other data, or changed since"
    "classes.txt": "data.target.class_names",
    "templates.txt": "data.target.templates",
    "model": "model.weights",
}
"""Files whose contents are changed behind a path, with the key that the error names."""


def other_files(folder: Path, kind: str) -> tuple[str, Any]:
    """The override for a path with other contents."""
    if kind == "model":
        return "model.name", tiny.write_model(folder / "other model", tiny.FEW_TOKENS, seed=1)
    if kind == "target":
        return "data.target.path", tiny.write_target(folder / "other target", count=25)["path"]
    lines = (folder / "target" / kind).read_text().splitlines()
    path = folder / f"other {kind}"
    path.write_text("\n".join(reversed(lines)))
    return f"data.target.{'class_names' if kind == 'classes.txt' else 'templates'}", str(path)


def cases(folder: Path) -> dict[str, Any]:
    ranks = join()
    Part.backend = "torch"
    tree = json.loads((folder / "config.json").read_text())
    run = Folder(ranks, tree, folder / "run")
    results: dict[str, Any] = {"first": run.start()}
    files = [path for path in run.path.rglob("*") if path.is_file()]
    results["modes"] = {str(path.relative_to(run.path)): path.stat().st_mode & 0o777 for path in files}
    complete = run.contents()
    results["again"], results["same"] = (
        run.start(),
        {name: content == complete[name] for name, content in run.contents().items() if name != "config.json"},
    )
    before = run.contents()
    results["files"] = run.start(*(other_files(folder, kind) for kind in OTHER_FILES))
    results["several"] = run.start(("train.learning_rate", 0.5), ("train.seed", 7), ("train.epochs", 9))
    results["fewer"] = run.start(("train.max_steps", 2))
    checkpoint_path = str(sorted((run.path / "checkpoints").glob("step*"))[-1])
    elsewhere = Folder(ranks, tree, folder / "elsewhere")
    results["by path, refused"] = elsewhere.start(("train.resume", checkpoint_path), ("train.seed", 7))
    results["untouched"] = run.contents() == before
    # Changes that do not stop a resume.
    moved = str(shutil.copytree(folder / "target", folder / "moved"))
    silent = [("data.target.path", moved), ("data.target.class_names", f"{moved}/classes.txt")]
    silent += [("data.target.text_length", 77)]  # the model's own
    silent += [("train.log_every", 2), ("train.keep_last", 5), ("train.checkpoint_every", 7)]
    results["silent"] = run.start(*silent)
    results["rounding"] = run.start(("train.micro_batch_size", 3), ("train.fast_blocks", False))
    copied = run.copy("copied")
    results["longer"] = copied.start(("train.max_steps", 5))
    results["longer steps"] = copied.steps()
    results["by path"] = elsewhere.start(("train.resume", checkpoint_path), ("train.max_steps", 5))
    results["by path steps"] = elsewhere.steps()
    weights = [load_file(one.path / "model.safetensors") for one in (copied, elsewhere)]
    results["by path same"] = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # A start by path that is killed before its first checkpoint resumes from the same place.
    killed = Folder(ranks, tree, folder / "killed")
    longer = ("train.max_steps", 5)
    results["by path, killed"] = killed.start(("train.resume", checkpoint_path), longer, kill_at=4)
    results["by path, resumed"] = killed.start(longer)
    results["never"] = {name: _never(run.copy(f"never {name}"), kill) for name, kill in KILLS.items()}
    results["old"] = _old_format(run.copy("old"))
    results["link"] = _on_another_disk(Folder(ranks, tree, folder / "linked"), folder / "disk")
    results["tracked"] = _tracked(Folder(ranks, tree, folder / "tracked"))
    results["backgrounds"] = _with_backgrounds(Folder(ranks, tree, folder / "starft"), folder)
    few = [("train.warmup_steps", 500), ("data.target.batch_size", 1), ("train.max_steps", 1)]
    results["few"] = Folder(ranks, tree, folder / "few").start(*few)
    return results


def _on_another_disk(folder: Folder, disk: Path) -> tuple[str, str, list[str], bool]:
    """A run whose checkpoints are behind a symlink, resumed and then trained again."""
    disk.mkdir()
    folder.path.mkdir()
    (folder.path / "checkpoints").symlink_to(disk)
    rotating = ("train.checkpoint_every", 1), ("train.keep_last", 1)
    folder.start(*rotating, kill_at=STEPS)
    resumed = folder.start(*rotating)
    again = folder.start(("train.resume", "never"), *rotating)
    kept = sorted(path.name for path in disk.iterdir())
    return resumed, again, kept, (folder.path / "checkpoints").is_symlink()


def _with_backgrounds(run: Folder, folder: Path) -> dict[str, str]:
    """A StarFT run that is started again with the same backgrounds in another file, with others and without."""
    files = {"first": "{} here\n{} there\n", "same": "{} here\n{} there\n", "other": "{} here\n{} there.\n"}
    outputs = {}
    for name, content in files.items():
        path = folder / f"{name} backgrounds.txt"
        path.write_text(content)
        outputs[name] = run.start(("objective", {"name": "starft", "backgrounds": str(path)}))
    outputs["shipped"] = run.start(("objective", {"name": "starft"}))
    outputs["longer"] = run.start(("objective", {"name": "starft"}), ("train.max_steps", STEPS + 1))
    return outputs


def _tracked(folder: Folder) -> tuple[str, str]:
    """Output of a run with a tracker, killed after its last step, and resumed from an earlier checkpoint."""
    os.environ["WANDB_MODE"] = "offline"
    on: list[tuple[str, Any]] = [("track", ["wandb"])]
    killed = folder.start(*on, ("train.checkpoint_every", 1), kill_at=3)
    shutil.rmtree(max((folder.path / "checkpoints").glob("step*")))
    return killed, folder.start(*on)


@contextlib.contextmanager
def _raises_in(holder: Any, name: str, call: int = 1, after: bool = False, always: bool = False) -> Iterator[None]:
    function, calls = getattr(holder, name), iter(range(1, 1000))

    def wrapped(*arguments: Any, **named: Any) -> Any:
        number = next(calls)
        if not after and (always or number == call):
            raise KilledError
        value = function(*arguments, **named)
        if always or number == call:
            raise KilledError
        return value

    setattr(holder, name, wrapped)
    try:
        yield
    finally:
        setattr(holder, name, function)


KILLS: dict[str, Callable[[], Any]] = {
    "before the id": lambda: _raises_in(lineage, "write_atomic"),
    # In the writing thread, which ends there; the run itself ends after its third step.
    "before the first checkpoint has its name": lambda: _raises_in(saver._Save, "_commit", always=True),
    "while older checkpoints go": lambda: _raises_in(saver, "_remove", after=True, always=True),
}


def _never(folder: Folder, kill: Callable[[], Any]) -> tuple[str, str, list[int], bool]:
    """``never`` in the folder of a finished run, killed; then ``auto``, which must not use the old run's steps."""
    options = ("train.learning_rate", 1e-5), ("train.checkpoint_every", 1)
    with kill():
        killed = folder.start(("train.resume", "never"), *options, kill_at=STEPS)
    again = folder.start(*options)
    return killed, again, folder.steps(), (folder.path / lineage.REPLACED).exists()


def _old_format(folder: Folder) -> tuple[str, str]:
    (path,) = (folder.path / "checkpoints").glob("step*")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    (folder.path / "checkpoints" / lineage.FILE).unlink()
    refused = folder.start()
    return refused, folder.start(("train.resume", "never"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    (path / "config.json").write_text(json.dumps(flyp(path)))
    return path


def flyp(path: Path) -> dict[str, Any]:
    """A config of FLYP with three quick steps."""
    tree = tiny.write_config(path, max_steps=STEPS, epochs=9, learning_rate=1e-4)
    tree["objective"] = {"name": "flyp"}
    del tree["data"]["reference"]
    tree["data"]["target"]["batch_size"] = 4
    tree["deepspeed"]["zero_optimization"]["stage"] = 0
    return tree


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_ranks(1, cases, folder, init=False, timeout=600)[0]


def test_finished_run_is_reported_and_left_unchanged(results: dict[str, Any]) -> None:
    assert "error" not in results["first"]
    assert "already complete: step 3 of 3" in results["again"]
    assert "train.resume=never trains again" in results["again"]
    assert all(results["same"].values()), results["same"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return flyp(tmp_path_factory.mktemp("tree"))


def identity_of(tree: dict[str, Any], *overrides: tuple[str, Any]) -> Identity:
    return run_identity.config_identity(RunConfig.model_validate_json(json.dumps(changed(tree, *overrides))))


@pytest.mark.parametrize("key", REFUSED)
def test_changed_key_is_refused_with_both_values(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"belongs to a run with other settings .*{key}: ") as error:
        run_identity.check_resumable(Path("a"), identity_of(tree), identity_of(tree, (key, REFUSED[key])))
    message = str(error.value)
    assert f"{json.dumps(REFUSED[key])} here" in message or "entry" in message
    assert "train.output" in message
    assert "train.resume=never" in message


def test_keys_without_a_result_are_not_compared(tree: dict[str, Any]) -> None:
    others = [("train.log_every", 9), ("train.output", "b"), ("data.target.workers", 3), ("train.keep_last", 7)]
    others += [("train.rank_timeout", 9.0), ("track", ["wandb"])]
    assert identity_of(tree) == identity_of(tree, *others)
    longer = [("train.epochs", 11), ("deepspeed.zero_optimization.stage", 1)]
    changes = run_identity.check_resumable(Path("a"), identity_of(tree), identity_of(tree, *longer))
    assert [change.key for change in changes] == ["train.epochs", "deepspeed.zero_optimization.stage"]


def test_every_setting_of_a_model_is_in_the_identity(tree: dict[str, Any]) -> None:
    others: dict[str, Any] = {
        "logit_scale_max": 50.0,
        "lora": {"rank": 2},
        "freeze": ["text"],
        "license": "mit",
    }
    assert {*others, *run_identity.TOLD_BY_WEIGHTS} == set(ModelConfig.model_fields)
    before = run_identity.settings_of(ModelConfig(name="a", random=True))
    assert before == {}
    for key, value in others.items():
        after = run_identity.settings_of(ModelConfig.model_validate({"name": "a", "random": True, key: value}))
        assert (key in after) == (key != "license"), key


@pytest.mark.parametrize(("kind", "key"), OTHER_FILES.items())
def test_changed_files_are_refused(results: dict[str, Any], kind: str, key: str) -> None:
    assert f"{key}: " in results["files"], kind
    assert "belongs to a run with other settings" in results["files"]


def test_changed_backgrounds_stop_a_resume(results: dict[str, Any]) -> None:
    outputs = results["backgrounds"]
    assert "error" not in outputs["first"]
    assert "already complete" in outputs["same"]
    for name in ("other", "shipped"):
        assert "data.target.second_templates" in outputs[name]
        assert "belongs to a run with other settings" in outputs[name]
    assert "total_steps: 3 there, 4 here" in outputs["longer"]


def test_every_refused_key_is_named_and_nothing_is_written(results: dict[str, Any]) -> None:
    assert "train.seed: 0 there, 7 here; train.learning_rate: 0.0001 there, 0.5 here" in results["several"]
    assert "train.epochs" not in results["several"]
    assert "is after step 3, beyond the 2 steps of this config" in results["fewer"]
    assert "train.seed: 0 there, 7 here" in results["by path, refused"]
    assert results["untouched"]


def test_settings_without_effect_are_not_reported(results: dict[str, Any]) -> None:
    lines = results["silent"].splitlines()
    started = ("fast blocks: image and text towers", "loader workers on each rank: ")
    assert next(line for line in lines if not line.startswith(started)).startswith("already complete")
    assert " there, " not in results["silent"]
    assert "train.micro_batch_size: nothing there, 3 here; the run continues, the last bits" in results["rounding"]
    assert "train.fast_blocks: true there, false here; the run continues, the last bits" in results["rounding"]
    assert "fast blocks: none (train.fast_blocks = false)" in results["rounding"]


def test_longer_run_resumes_and_reports_its_learning_rate(results: dict[str, Any]) -> None:
    assert "train.max_steps: 3 there, 5 here; the run continues" in results["longer"]
    assert (
        "has 5 steps instead of 3: its learning rate goes from 5e-05 at step 3 to 5e-05 at step 4"
        in results["longer"]
    )
    assert "continues after step 3 of 5, from " in results["longer"]
    assert results["longer steps"] == [1, 2, 3, 4, 5]


def test_resume_by_path_continues_the_run_in_another_folder(results: dict[str, Any]) -> None:
    assert "continues after step 3 of 5" in results["by path"]
    assert results["by path steps"] == [4, 5]
    assert results["by path same"]
    assert results["by path, killed"].endswith("killed")
    assert "continues after step 3 of 5, from " in results["by path, resumed"]


@pytest.mark.parametrize("kill", KILLS)
def test_resume_never_discards_the_older_run(results: dict[str, Any], kill: str) -> None:
    killed, again, steps, is_replaced_there = results["never"][kill]
    assert killed.endswith("killed")
    if kill == "before the id":
        # Nothing of the new run exists yet: the error is that of the older run's folder.
        assert "train.learning_rate: 0.0001 there, 1e-05 here" in again
        return
    assert "error" not in again, again
    assert "continues after step 3" not in again
    assert "already complete" not in again
    assert steps == [1, 2, 3]
    assert not is_replaced_there


def test_checkpoint_of_older_format_is_refused_in_one_line(results: dict[str, Any]) -> None:
    refused, never = results["old"]
    assert "checkpoint format 1, but this version reads format 2" in refused
    assert "train.resume=never" in refused
    assert "error" not in never


def test_keys_ignored_by_a_resume_exist() -> None:
    """The pattern of a renamed key would match nothing, and the key would stop a resume."""
    tree = RunConfig.model_validate(
        {
            "model": {"name": "demo"},
            "data": {half: {"format": "csv", "path": "x"} for half in ("target", "reference")},
        }
    )
    keys = ["track", *(f"{section}.{key}" for section, held in tree.model_dump().items() for key in held)]
    for section in ("target", "reference"):
        keys += [f"data.{section}.{key}" for key in tree.model_dump()["data"][section]]
    options = [name for part in registry.table().targets.values() for name in part.Options.model_fields]
    keys += [f"objective.{prefix}{name}" for name in options for prefix in ("", "target.")]
    own = ("deepspeed.", "versions.", "ranks", "data.*.decoder")
    patterns = (*run_identity.NO_RESULT, *run_identity.CONTINUES, *run_identity.ROUNDING)
    for pattern in patterns:
        if not pattern.startswith(own):
            assert any(run_identity.matches(key, [pattern]) for key in keys), pattern


def test_run_files_follow_the_umask(results: dict[str, Any]) -> None:
    os.umask(mask := os.umask(0))
    assert {name: mode for name, mode in results["modes"].items() if mode != 0o666 & ~mask} == {}
    assert "model.safetensors" in results["modes"]


def test_tracker_has_each_step_once_after_a_resume(results: dict[str, Any], folder: Path) -> None:
    killed, resumed = results["tracked"]
    assert "track: wandb: offline; upload by: wandb sync " in killed
    assert "track: wandb: cannot rewind: the values of steps" in resumed
    segments = wandb_segments(folder / "tracked")
    assert [step for step, _ in wandb_history(segments)["loss"]] == [1, 2, 3]
    assert wandb_exits(segments) == [1, 0]


@pytest.mark.parametrize(
    ("error", "state"), [(None, "finished"), (train.Stopped("SIGTERM"), "stopped"), (KilledError(), "failed")]
)
def test_trackers_learn_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, state: str
) -> None:
    states: list[str] = []
    monkeypatch.setattr(train.Trackers, "close", lambda _, state: states.append(state))
    run: Any = SimpleNamespace(
        config=SimpleNamespace(track=[]), folder=tmp_path, record=SimpleNamespace(run="id"), ranks=ALONE
    )
    with contextlib.suppress(KilledError, train.Stopped), train._tracking(run):
        if error is not None:
            raise error
    assert states == [state]


def test_checkpoints_behind_a_symlink_rotate_and_resume(results: dict[str, Any]) -> None:
    resumed, again, kept, is_link = results["link"]
    assert "continues after step " in resumed
    assert "error" not in again
    assert kept == ["latest", "run.json", "step00000003"]
    assert is_link


def test_settings_that_hardly_train_are_reported(results: dict[str, Any]) -> None:
    printed = results["few"]
    assert (
        "train.warmup_steps = 500 (config in Python) of the 1 steps of this run: the learning rate only" in printed
    )
    assert "rises, to 2e-07" in printed
    assert "set train.warmup_steps=1 " in printed
    assert "data.target.batch_size = 1 (config in Python): the contrastive loss of a single pair is 0" in printed


def test_average_longer_than_the_run_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig.model_validate(tiny.write_config(tmp_path, ema=0.9999, warmup_steps=0))
    needs = registry.needs(config.objective)
    guard_rails.warn_of_schedule(config, needs, 500)
    line = "train.ema = 0.9999 (config in Python) averages over about 10000 steps, and this run has 500"
    assert line in caplog.text
    assert "set train.ema=0.98 for a tenth of the run" in caplog.text
    caplog.clear()
    guard_rails.warn_of_schedule(config, needs, 20000)
    assert caplog.text == ""


def test_resume_with_other_class_names_is_refused(tmp_path: Path) -> None:
    printed, names = run_ranks(1, _renamed_class, tmp_path, init=False)[0]
    assert 'data.target.class_names: entry 0 is "grass" there, "sea" here' in printed
    assert names == ["grass", "sea", "sky"]


def _renamed_class(path: Path) -> tuple[str, list[str]]:
    Part.backend = "torch"
    tree = tiny.write_config(path, max_steps=1)
    for number, name in enumerate(("grass", "sea", "sky")):
        (path / "images" / name).mkdir(parents=True)
        for image in range(4):
            (path / "images" / name / f"{image}.jpg").write_bytes(tiny.jpeg(10 * number + image))
    tree["data"] = {"target": {"format": "folder", "path": str(path / "images"), "batch_size": 4, "workers": 0}}
    tree["objective"] = {"name": "vanilla_ft"}
    run = Folder(join(), tree, path / "run")
    run.start()
    (path / "images/grass").rename(path / "images/zebra_grass")
    return run.start(), list(heads.load(run.path / heads.FILE).class_names)


def test_other_length_is_refused_where_the_teacher_depends_on_it(tmp_path: Path) -> None:
    shorter, longer, again = run_ranks(1, _lengths, tmp_path, init=False)[0]
    for printed, there, here in ((longer, 2, 3), (shorter, 2, 1)):
        assert (
            f"(total_steps: {there} there, {here} here, set by train.epochs and train.max_steps; this" in printed
        )
    assert "already complete: step 2 of 2" in again


def _lengths(path: Path) -> list[str]:
    """The output of runs of TRACER that resume one of two steps, with one step, with three, and with two."""
    Part.backend = "torch"
    tree = flyp(path)
    tree["objective"] = {"name": "tracer"}
    run = Folder(join(), tree, path / "run")
    run.start(("train.max_steps", 2))
    return [run.start(("train.max_steps", steps)) for steps in (1, 3, 2)]


def test_missing_linear_map_is_an_error_before_the_teachers_cache(tmp_path: Path) -> None:
    printed, folders = run_ranks(1, _without_linear_map, tmp_path, init=False)[0]
    assert "the image tower of local-dir" in printed
    assert "does not end with a linear map" in printed
    assert "teacher" not in folders


def _without_linear_map(path: Path) -> tuple[str, list[str]]:
    Part.backend = "torch"
    tree = tiny.write_config(path)
    config = tiny.reduced("ViT-B-16-SigLIP")
    (path / "siglip").mkdir()
    tiny.write_tokenizer(path / "siglip")
    config["text_cfg"]["hf_tokenizer_name"] = str(path / "siglip")
    tree["model"]["name"] = tiny.write_model(path / "siglip", config)
    tree["objective"] = {"name": "tracer_dive"}
    run = Folder(join(), tree, path / "run")
    return run.start(), [each.name for each in run.path.glob("*")]


ACCURACIES = {1: 0.4, 2: 0.5, 3: 0.45, 4: 0.6, 5: 0.9, 6: 0.8, 7: 0.3, 8: 0.7}
"""Accuracies by step."""


@contextlib.contextmanager
def _decided(accuracies: dict[int, float]) -> Iterator[None]:
    """Replaces the measured accuracies by fixed ones."""
    evaluate, steps, patch = train.Validation.evaluate, [0], unittest.mock.patch.object

    def evaluate_at(self: train.Validation, step: int) -> dict[str, float]:
        steps[0] = step
        return evaluate(self, step)

    def measured(self: RunEvaluation, options: EvaluateConfig, exported: Path | None) -> Results:
        # Only the best weights are measured from their file, at the end of the run.
        step = steps[0]
        if exported is not None:
            step = json.loads((exported / "best/selected.json").read_text())["step"]
        return Results({name: Measured({"top1": accuracies[step]}, "prompts", 1) for name in options.sets}, {})

    def measured_at_the_end(self: RunEvaluation, exported: Path | None) -> Results:
        return measured(self, self._options, exported)

    with (
        patch(train.Validation, "evaluate", evaluate_at),
        patch(RunEvaluation, "measure_during", measured),
        patch(RunEvaluation, "measure_after", measured_at_the_end),
    ):
        yield


def validation_cases(folder: Path) -> dict[str, Any]:
    ranks = join()
    Part.backend = "torch"
    tree = json.loads((folder / "config.json").read_text())
    own = {key: tree["data"]["target"][key] for key in tiny.EVALUATION}
    tree["evaluate"] = {
        "sets": {"seen": own, "other": own | {"templates": "simple"}},
        "select": "seen",
        "every_steps": 2,
        "workers": 0,
        "baseline": False,
    }
    tree["train"] |= {"max_steps": 5, "keep_last": 9}
    results: dict[str, Any] = {}

    def state(run: Folder, printed: str) -> tuple[str, list[int], int, bool]:
        """The output, steps with an accuracy, the best step, and whether the run's weights are the best ones."""
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        evaluated = [line for line in lines if "accuracy/seen" in line]
        weights = [load_file(path / "model.safetensors") for path in (run.path, run.path / "best")]
        is_best = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        return printed, [line["step"] for line in evaluated], evaluated[-1]["best_step"], is_best

    def new(name: str) -> Folder:
        (folder / name).mkdir()
        return Folder(ranks, tree, folder / name / "run")

    def copy(run: Folder, name: str) -> Folder:
        shutil.copytree(run.path, folder / name / "run")
        return Folder(ranks, tree, folder / name / "run")

    longer = [("train.max_steps", 8), ("evaluate.every_steps", 3)]
    with _decided(ACCURACIES):
        complete = new("complete")
        results["complete"] = state(complete, complete.start())
        for name, options in {
            "longer": [],
            "gone": [],
            "other": [("evaluate.select", "other")],
            "damaged": [],
        }.items():
            run = copy(complete, name)
            if name == "gone":
                shutil.rmtree(run.path / "best")
            if name == "damaged":
                (run.path / "checkpoints/step00000005/rank00000.safetensors").write_bytes(b"")
            results[name] = state(run, run.start(*longer, *options))
        shutil.copytree(own["path"], folder / "elsewhere")
        tiny.write_target(folder / "fewer", count=6)
        moved, edited = copy(complete, "moved"), copy(complete, "edited")
        results["moved"] = state(moved, moved.start(("evaluate.sets.seen.path", str(folder / "elsewhere"))))
        results["edited"] = edited.start(("evaluate.sets.seen.path", str(folder / "fewer")))
        for name in ("noted", "kept"):
            run = new(name)
            with _raises_in(checkpoint, "write_evaluation", call=2, after=name == "kept"):
                run.start()
            results[name] = state(run, run.start(("evaluate.every_steps", 3), ("train.max_steps", 7)))
        run = new("patient")
        losing = {step: 1.0 - step / 10 for step in ACCURACIES}
        with _decided(losing):
            patience = ("evaluate.every_steps", 1)
            results["patience"] = [
                state(run, run.start(patience, ("evaluate.patience", number))) for number in (1, 1, 3)
            ]
    return results


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("validated")
    (path / "config.json").write_text(json.dumps(flyp(path)))
    return run_ranks(1, validation_cases, path, init=False, timeout=600)[0]


def test_last_evaluation_counts_after_a_resume_with_other_steps(validated: dict[str, Any]) -> None:
    assert validated["complete"][1:] == ([2, 4, 5, 5], 5, True)
    printed, steps, best, is_best = validated["longer"]
    assert "continues after step 5 of 8" in printed
    assert (steps, best, is_best) == ([2, 4, 5, 6, 8, 8], 5, True)


@pytest.mark.parametrize("name", ["noted", "kept"])
def test_kill_while_recording_an_evaluation_keeps_the_best(validated: dict[str, Any], name: str) -> None:
    """The kill is after step 4, at which the resumed run has no evaluation."""
    _, steps, best, is_best = validated[name]
    assert (best, is_best) == (6, True)
    assert steps == ([2, 6, 7, 7] if name == "noted" else [2, 4, 6, 7, 7])


def test_missing_best_weights_are_reported(validated: dict[str, Any]) -> None:
    printed, _, best, is_best = validated["gone"]
    assert "best: the best weights are gone; the best weights are chosen again" in printed
    assert (best, is_best) == (6, True)


def test_accuracies_on_another_set_are_not_compared(validated: dict[str, Any]) -> None:
    printed, _, best, _ = validated["other"]
    assert "evaluate.select: another set, or other settings of it, before step 5" in printed
    assert best == 6


def test_selection_compares_contents_of_the_set_and_no_paths(validated: dict[str, Any]) -> None:
    printed, _, best, is_best = validated["moved"]
    assert "another set" not in printed
    assert (best, is_best) == (validated["complete"][2], True)
    assert "evaluate.select: another set, or other settings of it, before step 5" in validated["edited"]


def test_best_weights_of_a_later_step_are_kept(validated: dict[str, Any]) -> None:
    """The checkpoint of step 5 is corrupt: the run resumes from step 4 and evaluates steps 6 and 8."""
    printed, steps, _, is_best = validated["damaged"]
    assert "skipped a corrupt checkpoint: " in printed
    assert steps == [2, 4, 6, 8, 8]
    assert is_best


def test_raised_patience_resumes_a_stopped_run(validated: dict[str, Any]) -> None:
    (stopped, first, *_), (again, second, *_), (raised, third, best, is_best) = validated["patience"]
    assert first == second == [1, 2, 2]
    assert "stops after step 2 of 5: 1 evaluation without a better accuracy on " in stopped
    assert "already complete: step 2 of 5, evaluate.patience ran out" in again
    assert "continues after step 2 of 5" in raised
    assert third == [1, 2, 3, 4, 4]
    assert (best, is_best) == (1, True)


# Ranks with unequal settings, and two runs in one folder


def _ranks_that_differ(folder: Path) -> dict[str, str]:
    ranks = join()
    Part.backend = "torch"
    tree = json.loads((folder / "config.json").read_text())
    results = {}
    for name, overrides in UNLIKE_RANKS.items():
        changes = [(key, str(folder / value) if "path" in key else value) for key, value in overrides]
        run = Folder(ranks, tree, folder / "run")
        results[name] = run.start(*(() if ranks.is_main else changes))
    folder_of_rank = folder if ranks.is_main else folder / "unlike"
    try:
        run_folder.SHARED_SECONDS = 0.0
        run_folder.check_shared(_locked_folder(folder_of_rank), ranks)
    except UserError as error:
        results["folder"] = str(error)
    return results


def _locked_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(str(folder))
    return folder


UNLIKE_RANKS: dict[str, list[tuple[str, Any]]] = {
    "train.learning_rate": [("train.learning_rate", 0.5)],
    "train.seed": [("train.seed", 5), ("train.keep_last", 7)],
    "train.max_steps": [("train.max_steps", 9)],
    "train.checkpoint_every": [("train.checkpoint_every", 1)],
    "objective.name": [("objective.name", "vanilla_ft")],
    "data.target.content": [("data.target.path", "reordered")],
    "data.target.content of more": [("data.target.path", "more")],
    "": [("data.target.path", "moved"), ("data.target.workers", 1)],
}
"""Settings of rank 1 that differ from rank 0, by the key that both ranks report; the last ones may differ."""


def test_unequal_ranks_name_rank_and_key(tmp_path: Path) -> None:
    tree = flyp(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    shutil.copytree(tmp_path / "target", tmp_path / "moved")
    tiny.write_target(tmp_path / "more", count=40)
    samples = {f"{i:04d}": {"jpg": tiny.jpeg(i), "cls": str(i % 5).encode()} for i in reversed(range(24))}
    tiny.write_tar(tmp_path / "reordered/shard-00000.tar", samples)
    first, second = run_ranks(2, _ranks_that_differ, tmp_path, init=False, timeout=400)
    for name in UNLIKE_RANKS:
        if name:
            assert f"rank 1 differs from rank 0 in {name.split()[0]}: " in first[name], first[name]
            assert first[name] == second[name]
    assert "train.seed: 5, not 0 (and in 1 more: train.keep_last)" in first["train.seed"]
    assert "error" not in first[""]
    assert "rank 1 on " in first["folder"]
    assert "has to be a folder that all machines share" in first["folder"]


def _hold(folder: Path, connection: Any) -> None:
    with folder_lock(folder, "run folder"):
        # As in a run: closing a second descriptor of the file would release the lock.
        run_folder.check_shared(folder, Ranks(0, 1, torch.device("cpu")))
        connection.send(os.getpid())
        connection.recv()


def _second_run(folder: Path) -> tuple[str, str, bool, int]:
    Part.backend = "torch"
    run = Folder(join(), json.loads((folder / "config.json").read_text()), folder / "run")
    first = run.start()
    before = run.contents()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    holder = context.Process(target=_hold, args=(run.path, theirs))
    holder.start()
    pid = ours.recv()
    second = run.start(("train.learning_rate", 0.5), ("train.resume", "never"))
    unchanged = run.contents() == before
    ours.send("end")
    holder.join()
    return first, second, unchanged, pid


def test_second_run_in_a_folder_is_refused_without_changes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flyp(tmp_path)))
    ((first, second, unchanged, pid),) = run_ranks(1, _second_run, tmp_path, init=False)
    assert "error" not in first
    assert f"is in use by process {pid} on " in second
    assert "train.output" in second
    assert unchanged
