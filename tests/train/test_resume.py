"""A run folder belongs to one run: differences are named or refused, ``never`` never meets the older run."""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file

from dive_fast.checkpoint import lineage, saver
from dive_fast.checkpoint import manifest as checkpoint
from dive_fast.distributed import Ranks, join
from dive_fast.engine.update import INITIAL_SCALE, LossScale
from dive_fast.errors import UserError
from dive_fast.identity import Identity
from dive_fast.locks import folder_lock
from dive_fast.methods import registry
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.train import loop as train
from dive_fast.train import run_identity
from dive_fast.train import setup as run_module

STEPS = 3


class KilledError(BaseException):
    """Stands for whatever ends a run at once."""


def changed(tree: dict[str, Any], *overrides: tuple[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(tree))
    for place, value in overrides:
        *sections, key = place.split(".")
        section = found
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return found


class Folder:
    """A run folder, and a process that starts runs in it."""

    def __init__(self, ranks: Ranks, tree: dict[str, Any], path: Path) -> None:
        self.ranks, self.tree, self.path = ranks, tree, path

    def start(self, *overrides: tuple[str, Any], kill_at: int | None = None) -> str:
        """Trains; returns all that is said, an error too. ``kill_at`` ends it after so many steps."""
        config = RunConfig.model_validate_json(json.dumps(changed(self.tree, *overrides)))
        said, log = io.StringIO(), train.Metrics.log
        handler = logging.StreamHandler(said)

        def log_until(metrics: train.Metrics, step: int, *values: Any) -> None:
            log(metrics, step, *values)
            if step == kill_at:
                raise KilledError

        logging.getLogger("dive_fast").addHandler(handler)
        train.Metrics.log = log_until  # type: ignore[method-assign]
        try:
            with contextlib.redirect_stdout(said):
                train.train(config, self.path, self.ranks)
        except UserError as error:
            said.write(f"error: {error}")
        except KilledError:
            said.write("killed")
        finally:
            train.Metrics.log = log  # type: ignore[method-assign]
            logging.getLogger("dive_fast").removeHandler(handler)
        return said.getvalue()

    def contents(self) -> dict[str, bytes]:
        """Of all files that a run leaves, but for the lock."""
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
    "objective.name": "vanilla_ft",
    "data.target.batch_size": 12,
    "data.target.text_length": 20,
    "deepspeed.gradient_clipping": 1.0,
}
"""A config's keys that change the result, with another value."""
OTHER_FILES = {
    "target": "data.target",  # with "other data, or changed since"
    "classes.txt": "data.target.class_names",
    "templates.txt": "data.target.templates",
    "model": "model.weights",
}
"""What may be changed behind a path, with the key that is named."""


def other_files(folder: Path, kind: str) -> tuple[str, Any]:
    """The override that leads to other files, or to changed ones at the old place."""
    if kind == "model":
        return "model.name", tiny.write_model(folder / "other model", seed=1)
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
    found: dict[str, Any] = {"first": run.start()}
    files = [path for path in run.path.rglob("*") if path.is_file()]
    found["modes"] = {str(path.relative_to(run.path)): path.stat().st_mode & 0o777 for path in files}
    whole = run.contents()
    found["again"], found["same"] = (
        run.start(),
        {name: content == whole[name] for name, content in run.contents().items() if name != "config.json"},
    )
    before = run.contents()
    found["files"] = run.start(*(other_files(folder, kind) for kind in OTHER_FILES))
    found["several"] = run.start(("train.learning_rate", 0.5), ("train.seed", 7), ("train.epochs", 9))
    found["fewer"] = run.start(("train.max_steps", 2))
    checkpoint_path = str(sorted((run.path / "checkpoints").glob("step*"))[-1])
    elsewhere = Folder(ranks, tree, folder / "elsewhere")
    found["by path, refused"] = elsewhere.start(("train.resume", checkpoint_path), ("train.seed", 7))
    found["untouched"] = run.contents() == before
    # What continues.
    moved = str(shutil.copytree(folder / "target", folder / "moved"))
    silent = [("data.target.path", moved), ("data.target.class_names", f"{moved}/classes.txt")]
    silent += [("data.target.text_length", 77)]  # the model's own
    silent += [("train.log_every", 2), ("train.keep_last", 5), ("train.checkpoint_every", 7)]
    found["silent"] = run.start(*silent)
    found["rounding"] = run.start(("train.micro_batch_size", 3))
    copied = run.copy("copied")
    found["longer"] = copied.start(("train.max_steps", 5))
    found["longer steps"] = copied.steps()
    found["by path"] = elsewhere.start(("train.resume", checkpoint_path), ("train.max_steps", 5))
    found["by path steps"] = elsewhere.steps()
    weights = [load_file(one.path / "model.safetensors") for one in (copied, elsewhere)]
    found["by path same"] = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # A start by path that is killed before its first checkpoint resumes from the same place.
    killed = Folder(ranks, tree, folder / "killed")
    longer = ("train.max_steps", 5)
    found["by path, killed"] = killed.start(("train.resume", checkpoint_path), longer, kill_at=4)
    found["by path, resumed"] = killed.start(longer)
    found["never"] = {name: _never(run.copy(f"never {name}"), kill) for name, kill in KILLS.items()}
    found["old"] = _old_format(run.copy("old"))
    found["link"] = _on_another_disk(Folder(ranks, tree, folder / "linked"), folder / "disk")
    found["monitors"] = _monitored(Folder(ranks, tree, folder / "monitored"))
    few = [("train.warmup_steps", 500), ("data.target.batch_size", 1), ("train.max_steps", 1)]
    found["few"] = Folder(ranks, tree, folder / "few").start(*few)
    return found


def _on_another_disk(folder: Folder, disk: Path) -> tuple[str, str, list[str], bool]:
    """A run whose checkpoints lie behind a link, resumed, and then trained again."""
    disk.mkdir()
    folder.path.mkdir()
    (folder.path / "checkpoints").symlink_to(disk)
    rotating = ("train.checkpoint_every", 1), ("train.keep_last", 1)
    folder.start(*rotating, kill_at=STEPS)
    resumed = folder.start(*rotating)
    again = folder.start(("train.resume", "never"), *rotating)
    kept = sorted(path.name for path in disk.iterdir())
    return resumed, again, kept, (folder.path / "checkpoints").is_symlink()


def _monitored(folder: Folder) -> tuple[list[str], list[int], list[int]]:
    """Files outside the usual ones; steps in the CSV and the TensorBoard file of a run killed and resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    on: list[tuple[str, Any]] = [
        (f"deepspeed.{name}", {"enabled": True}) for name in ("tensorboard", "csv_monitor")
    ]
    folder.start(*on, ("train.checkpoint_every", 1), kill_at=3)
    shutil.rmtree(max((folder.path / "checkpoints").glob("step*")))
    folder.start(*on)
    (csv,) = (folder.path / "csv_monitor").glob("train_loss.csv")
    rows = [line.split(",")[0] for line in csv.read_text().splitlines()]
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return rows[:1], [int(row) for row in rows[1:]], [event.step for event in events.Scalars("train/loss")]


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
    # In the thread that writes, which ends there; the run itself then ends after its third step.
    "before the first checkpoint has its name": lambda: _raises_in(saver._Save, "_commit", always=True),
    "while older checkpoints go": lambda: _raises_in(saver, "_remove", after=True, always=True),
}


def _never(folder: Folder, kill: Callable[[], Any]) -> tuple[str, str, list[int], bool]:
    """``never`` in the folder of a whole run, killed; then ``auto``, which must not use the whole run's steps."""
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
    """A config of three quick steps."""
    tree = tiny.write_config(path, max_steps=STEPS, epochs=9, learning_rate=1e-4)
    tree["objective"] = {"name": "flyp"}
    del tree["data"]["reference"]
    tree["data"]["target"]["batch_size"] = 4
    tree["deepspeed"]["zero_optimization"]["stage"] = 0
    return tree


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return run_ranks(1, cases, folder, init=False, timeout=600)[0]


def test_finished_run_is_reported_complete_and_stays_as_it_is(found: dict[str, Any]) -> None:
    assert "error" not in found["first"]
    assert "already complete: step 3 of 3" in found["again"]
    assert "train.resume=never trains again" in found["again"]
    assert all(found["same"].values()), found["same"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return flyp(tmp_path_factory.mktemp("tree"))


def of(tree: dict[str, Any], *overrides: tuple[str, Any]) -> Identity:
    return run_identity.of_config(RunConfig.model_validate_json(json.dumps(changed(tree, *overrides))))


@pytest.mark.parametrize("key", REFUSED)
def test_changed_key_is_refused_with_both_values(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"belongs to a run with other settings .*{key}: ") as error:
        run_identity.check_resumable(Path("a"), of(tree), of(tree, (key, REFUSED[key])))
    message = str(error.value)
    assert f"{json.dumps(REFUSED[key])} here" in message or "entry" in message
    assert "train.output" in message
    assert "train.resume=never" in message


def test_keys_without_a_result_are_not_compared(tree: dict[str, Any]) -> None:
    others = [("train.log_every", 9), ("train.output", "b"), ("data.target.workers", 3), ("train.keep_last", 7)]
    others += [("train.rank_timeout", 9.0), ("deepspeed.tensorboard", {"enabled": True})]
    assert of(tree) == of(tree, *others)
    longer = [("train.epochs", 11), ("deepspeed.zero_optimization.stage", 1)]
    found = run_identity.check_resumable(Path("a"), of(tree), of(tree, *longer))
    assert [one.key for one in found] == ["train.epochs", "deepspeed.zero_optimization.stage"]


@pytest.mark.parametrize(("kind", "key"), OTHER_FILES.items())
def test_changed_files_are_refused(found: dict[str, Any], kind: str, key: str) -> None:
    assert f"{key}: " in found["files"], kind
    assert "belongs to a run with other settings" in found["files"]


def test_every_refused_key_is_named_and_nothing_is_written(found: dict[str, Any]) -> None:
    assert "train.seed: 0 there, 7 here; train.learning_rate: 0.0001 there, 0.5 here" in found["several"]
    assert "train.epochs" not in found["several"]
    assert "is after step 3, beyond the 2 of this config" in found["fewer"]
    assert "train.seed: 0 there, 7 here" in found["by path, refused"]
    assert found["untouched"]


def test_what_changes_no_result_is_not_mentioned(found: dict[str, Any]) -> None:
    assert found["silent"].startswith("already complete")
    assert " there, " not in found["silent"]
    assert "train.micro_batch_size: nothing there, 3 here; the run continues, the last bits" in found["rounding"]


def test_longer_run_continues_and_reports_its_learning_rate(found: dict[str, Any]) -> None:
    assert "train.max_steps: 3 there, 5 here; the run continues" in found["longer"]
    assert (
        "has 5 steps instead of 3: its learning rate goes from 5e-05 at step 3 to 5e-05 at step 4"
        in found["longer"]
    )
    assert "continues after step 3 of 5, from " in found["longer"]
    assert found["longer steps"] == [1, 2, 3, 4, 5]


def test_run_by_path_in_another_folder_is_the_same_run(found: dict[str, Any]) -> None:
    assert "continues after step 3 of 5" in found["by path"]
    assert found["by path steps"] == [4, 5]
    assert found["by path same"]
    assert found["by path, killed"].endswith("killed")
    assert "continues after step 3 of 5, from " in found["by path, resumed"]


@pytest.mark.parametrize("kill", KILLS)
def test_never_does_not_meet_the_older_run_again(found: dict[str, Any], kill: str) -> None:
    killed, again, steps, is_replaced_there = found["never"][kill]
    assert killed.endswith("killed")
    if kill == "before the id":
        # Nothing of the new run exists yet: the folder is still the older run's, which it says.
        assert "train.learning_rate: 0.0001 there, 1e-05 here" in again
        return
    assert "error" not in again, again
    assert "continues after step 3" not in again
    assert "already complete" not in again
    assert steps == [1, 2, 3]
    assert not is_replaced_there


def test_checkpoint_of_an_older_version_is_refused_in_one_line(found: dict[str, Any]) -> None:
    refused, never = found["old"]
    assert "checkpoint format 1, but this version reads format 2" in refused
    assert "train.resume=never" in refused
    assert "error" not in never


def test_keys_that_a_resume_ignores_exist() -> None:
    """A renamed key would be compared, or, worse, its old name never."""
    tree = RunConfig.model_validate(
        {
            "model": {"name": "demo"},
            "data": {half: {"format": "csv", "path": "x"} for half in ("target", "reference")},
        }
    )
    keys = [f"{section}.{key}" for section, held in tree.model_dump().items() for key in held]
    for section in ("target", "reference"):
        keys += [f"data.{section}.{key}" for key in tree.model_dump()["data"][section]]
    own = ("deepspeed.", "versions.", "ranks", "data.*.decoder")
    patterns = (*run_identity.NO_RESULT, *run_identity.CONTINUES, *run_identity.ROUNDING)
    for pattern in patterns:
        if not pattern.startswith(own):
            assert any(run_identity.matches(key, [pattern]) for key in keys), pattern


def test_files_of_a_run_have_the_umasks_mode(found: dict[str, Any]) -> None:
    os.umask(mask := os.umask(0))
    assert {name: mode for name, mode in found["modes"].items() if mode != 0o666 & ~mask} == {}
    assert "model.safetensors" in found["modes"]


def test_monitors_write_each_step_once_in_the_run_folder(found: dict[str, Any]) -> None:
    _, rows, events = found["monitors"]
    assert rows == events == [4 * step for step in (1, 2, 3)]


def test_checkpoints_behind_a_link_rotate_and_resume_there(found: dict[str, Any]) -> None:
    resumed, again, kept, is_link = found["link"]
    assert "continues after step " in resumed
    assert "error" not in again
    assert kept == ["latest", "run.json", "step00000003"]
    assert is_link


def test_settings_that_train_next_to_nothing_are_reported(found: dict[str, Any]) -> None:
    said = found["few"]
    assert "train.warmup_steps = 500 of the 1 steps of this run: the learning rate only rises, to 2e-07" in said
    assert "set train.warmup_steps=1 " in said
    assert "data.target.batch_size = 1: the contrastive loss of a single pair is 0" in said


def test_steps_beyond_the_epochs_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig.model_validate(tiny.write_config(tmp_path, max_steps=40))
    run_module._warn_of_schedule(config, registry.needs(config.objective), 3)
    assert "train.max_steps = 40, but train.epochs = 1 ends the run after 3 steps" in caplog.text
    caplog.clear()
    run_module._warn_of_schedule(config, registry.needs(config.objective), 40)
    assert caplog.text == ""


def test_head_of_other_class_names_is_refused(tmp_path: Path) -> None:
    said, names = run_ranks(1, _renamed_class, tmp_path, init=False)[0]
    assert 'data.target.class_names: entry 0 is "grass" there, "sea" here' in said
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


ACCURACIES = {1: 0.4, 2: 0.5, 3: 0.45, 4: 0.6, 5: 0.9, 6: 0.8, 7: 0.3, 8: 0.7}
"""Of the weights after so many steps, as the tests have it."""


@contextlib.contextmanager
def _decided(accuracies: dict[int, float]) -> Iterator[None]:
    """Accuracies are those decided here, whatever the weights are."""
    evaluate, measure, steps = train.Validation.evaluate, train.Validation._measure, [0]

    def evaluate_at(self: train.Validation, step: int) -> dict[str, float]:
        steps[0] = step
        return evaluate(self, step)

    def measured(self: train.Validation, options: Any, exported: Path | None) -> dict[str, float]:
        # Only the best weights are measured from their file, at the end of the run.
        step = steps[0]
        if exported is not None:
            step = json.loads((exported / "best/selected.json").read_text())["step"]
        return {f"accuracy/{name}": accuracies[step] for name in options.sets}

    train.Validation.evaluate, train.Validation._measure = evaluate_at, measured  # type: ignore[method-assign]
    try:
        yield
    finally:
        train.Validation.evaluate, train.Validation._measure = evaluate, measure  # type: ignore[method-assign]


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
    }
    tree["train"] |= {"max_steps": 5, "keep_last": 9}
    found: dict[str, Any] = {}

    def state(run: Folder, said: str) -> tuple[str, list[int], int, bool]:
        """What is said, steps with an accuracy, the best step, whether the run's weights are the best ones."""
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        evaluated = [line for line in lines if "accuracy/seen" in line]
        weights = [load_file(path / "model.safetensors") for path in (run.path, run.path / "best")]
        is_best = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        return said, [line["step"] for line in evaluated], evaluated[-1]["best_step"], is_best

    def new(name: str) -> Folder:
        (folder / name).mkdir()
        return Folder(ranks, tree, folder / name / "run")

    def copy(run: Folder, name: str) -> Folder:
        shutil.copytree(run.path, folder / name / "run")
        return Folder(ranks, tree, folder / name / "run")

    longer = [("train.max_steps", 8), ("evaluate.every_steps", 3)]
    with _decided(ACCURACIES):
        whole = new("whole")
        found["whole"] = state(whole, whole.start())
        for name, options in {
            "longer": [],
            "gone": [],
            "other": [("evaluate.select", "other")],
            "damaged": [],
        }.items():
            run = copy(whole, name)
            if name == "gone":
                shutil.rmtree(run.path / "best")
            if name == "damaged":
                (run.path / "checkpoints/step00000005/rank00000.safetensors").write_bytes(b"")
            found[name] = state(run, run.start(*longer, *options))
        for name in ("noted", "kept"):
            run = new(name)
            with _raises_in(checkpoint, "write_evaluation", call=2, after=name == "kept"):
                run.start()
            found[name] = state(run, run.start(("evaluate.every_steps", 3), ("train.max_steps", 7)))
        run = new("patient")
        losing = {step: 1.0 - step / 10 for step in ACCURACIES}
        with _decided(losing):
            patience = ("evaluate.every_steps", 1)
            found["patience"] = [
                state(run, run.start(patience, ("evaluate.patience", number))) for number in (1, 1, 3)
            ]
    return found


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("validated")
    (path / "config.json").write_text(json.dumps(flyp(path)))
    return run_ranks(1, validation_cases, path, init=False, timeout=600)[0]


def test_last_evaluation_counts_whatever_the_run_is_resumed_with(validated: dict[str, Any]) -> None:
    assert validated["whole"][1:] == ([2, 4, 5, 5], 5, True)
    said, steps, best, is_best = validated["longer"]
    assert "continues after step 5 of 8" in said
    assert (steps, best, is_best) == ([2, 4, 5, 6, 8, 8], 5, True)


@pytest.mark.parametrize("name", ["noted", "kept"])
def test_kill_around_the_note_of_an_evaluation_keeps_the_best(validated: dict[str, Any], name: str) -> None:
    """After step 4, which is no step of an evaluation in the run that resumes."""
    _, steps, best, is_best = validated[name]
    assert (best, is_best) == (6, True)
    assert steps == ([2, 6, 7, 7] if name == "noted" else [2, 4, 6, 7, 7])


def test_best_weights_that_are_gone_are_reported(validated: dict[str, Any]) -> None:
    said, _, best, is_best = validated["gone"]
    assert "best: the best weights are gone; the best weights are chosen again" in said
    assert (best, is_best) == (6, True)


def test_accuracies_of_another_set_are_not_compared(validated: dict[str, Any]) -> None:
    said, _, best, _ = validated["other"]
    assert "evaluate.select: measured otherwise before step 5" in said
    assert best == 6


def test_best_weights_of_a_later_step_stay_the_best(validated: dict[str, Any]) -> None:
    """The checkpoint of step 5 is damaged: step 4 is resumed from, and steps 6 and 8 are evaluated."""
    said, steps, _, is_best = validated["damaged"]
    assert "skipped a corrupt checkpoint: " in said
    assert steps == [2, 4, 6, 8, 8]
    assert is_best


def test_patience_raised_after_it_ran_out_continues(validated: dict[str, Any]) -> None:
    (_, first, *_), (again, second, *_), (raised, third, best, is_best) = validated["patience"]
    assert first == second == [1, 2, 2]
    assert "already complete: step 2 of 5, evaluate.patience ran out" in again
    assert "continues after step 2 of 5" in raised
    assert third == [1, 2, 3, 4, 4]
    assert (best, is_best) == (1, True)


def test_loss_scale_of_another_precision_is_not_taken_over() -> None:
    cpu = torch.device("cpu")
    scale = LossScale("bf16", cpu)
    scale.skipped_steps += 3
    other = LossScale("fp16", cpu)
    other.load_state_dict(scale.state_dict())
    assert other.value == INITIAL_SCALE
    assert other.skipped_steps == 3
    other.value.fill_(1024.0)
    again, plain = LossScale("fp16", cpu), LossScale("fp32", cpu)
    again.load_state_dict(other.state_dict())
    plain.load_state_dict(other.state_dict())
    assert again.value == 1024
    assert plain.value == 1


# Ranks that are started by hand, and runs in one folder


def _ranks_that_differ(folder: Path) -> dict[str, str]:
    ranks = join()
    Part.backend = "torch"
    tree = json.loads((folder / "config.json").read_text())
    found = {}
    for name, overrides in UNLIKE_RANKS.items():
        told = [(key, str(folder / value) if "path" in key else value) for key, value in overrides]
        run = Folder(ranks, tree, folder / "run")
        found[name] = run.start(*(() if ranks.is_main else told))
    folder_of_rank = folder if ranks.is_main else folder / "unlike"
    try:
        run_module.SHARED_SECONDS = 0.0
        run_module.check_shared(_locked_folder(folder_of_rank), ranks)
    except UserError as error:
        found["folder"] = str(error)
    return found


def _locked_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(str(folder))
    return folder


UNLIKE_RANKS: dict[str, list[tuple[str, Any]]] = {
    "train.learning_rate": [("train.learning_rate", 0.5)],
    "train.seed": [("train.seed", 5), ("train.keep_last", 7)],
    "train.max_steps": [("train.max_steps", 9)],
    "train.checkpoint_every": [("train.checkpoint_every", 1)],
    "objective.weight": [("objective.weight", 100)],
    "data.target.content": [("data.target.path", "reordered")],
    "data.target.content of more": [("data.target.path", "more")],
    "": [("data.target.path", "moved"), ("data.target.workers", 1)],
}
"""What rank 1 is told otherwise than rank 0, and the key that both name; the last is no difference."""


def test_ranks_that_differ_name_rank_and_key(tmp_path: Path) -> None:
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
        # As a run does: whoever closes a second descriptor of the file loses the lock.
        run_module.check_shared(folder, Ranks(0, 1, torch.device("cpu")))
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


def test_second_run_in_a_folder_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flyp(tmp_path)))
    ((first, second, unchanged, pid),) = run_ranks(1, _second_run, tmp_path, init=False)
    assert "error" not in first
    assert f"is in use by process {pid} on " in second
    assert "train.output" in second
    assert unchanged
