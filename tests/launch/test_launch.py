"""The commands as a user runs them: exit codes, errors in one line, with and without a launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
from distributed import run_ranks, run_script
from safetensors.torch import load_file

from dive_fast.commands import train
from dive_fast.methods.method import Part
from dive_fast.teacher.cache_files import CacheError, StaleCacheError

ROOT = Path(__file__).parents[2]


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a new process, as a shell does: without Triton's interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": path, "TRITON_INTERPRET": "0"} | environment
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def call_alone(*command: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a script without a launcher: on one rank, or on ``ranks`` ranks with their environment set."""
    return run_script(*command, cwd=ROOT, environment={"DS_ACCELERATOR": "cpu"}, ranks=ranks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo.json", "train.epoch=3"], "unknown key train.epoch; did you mean train.epochs?"),
        (["demo.json", "train.epochs=many"], 'train.epochs = "many": input should be a valid integer'),
        (["dem.json"], "--config dem.json: no such file"),
        (["demo.json", "epochs"], "expected section.key=value"),
    ],
)
def test_train_reports_typo_in_one_line_with_exit_code_2(arguments: list[str], message: str) -> None:
    result = call_alone("launch/train.py", "--config", *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert result.stdout == ""


def test_train_reports_missing_data_set_before_building_model(tmp_path: Path) -> None:
    # Evaluation sets are small, and opened before the target.
    sets = ["evaluate.sets={}", "evaluate.select=null"]
    arguments = [f"data.target.path={tmp_path}/nowhere", f"train.output={tmp_path}/run", *sets]
    result = call_alone("launch/train.py", "--config", "vitb16_flyp", *arguments)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    origin = "data.target.path is set on the command line"
    assert errors == [f"error: data.target: {tmp_path}/nowhere: no such folder ({origin})"]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deepspeed.zero_optimization.stgae=1", "deepspeed: stgae, in DeepSpeedZeroConfig: Extra inputs are"),
        (
            "deepspeed.zero_optimizaton.stage=1",
            "unknown key deepspeed.zero_optimizaton; did you mean deepspeed.zero_optim",
        ),
        ('deepspeed.zero_optimization.stage="3"', 'stage = "3": expected auto, 0, 1, 2 or 3'),
        ("deepspeed.zero_optimization=3", "deepspeed.zero_optimization = 3: expected an object"),
        ('deepspeed.gradient_clipping="1"', 'deepspeed.gradient_clipping = "1": expected a number'),
        ("deepspeed.gradient_clipping=null", "deepspeed.gradient_clipping = null: expected a number"),
        ("deepspeed.gradient_clipping=true", "deepspeed.gradient_clipping = true: expected a number"),
        ("deepspeed.gradient_clipping=-1", "deepspeed.gradient_clipping = -1: expected a number of at least 0"),
        ("deepspeed.steps_per_print=0", "deepspeed.steps_per_print = 0: expected a number of at least 1"),
        ('deepspeed.prescale_gradients="no"', 'deepspeed.prescale_gradients = "no": expected true or false'),
    ],
)
def test_train_validates_deepspeed_section_at_start(override: str, message: str) -> None:
    result = call_alone("launch/train.py", "--config", "demo", override)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in result.stderr


WITHOUT_ASSERTS = f"""if True:
    import runpy, sys
    from importlib.machinery import SourceFileLoader
    folders, get_code = {(f"{ROOT}/dive_fast/", f"{ROOT}/kernels/")!r}, SourceFileLoader.get_code
    def optimized(loader, name):
        if not loader.path.startswith(folders):
            return get_code(loader, name)
        return compile(loader.get_data(loader.path), loader.path, "exec", dont_inherit=True, optimize=1)
    SourceFileLoader.get_code = optimized
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""As ``python -O script`` for this repository's modules: to compile PyTorch's takes longer than the training."""


def test_train_alone_optimized_and_on_two_ranks(tmp_path: Path) -> None:
    tree = tiny.write_config(tmp_path, max_steps=2)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tree))
    for name in ("one, optimized", "two"):
        run = tmp_path / name
        command = str(ROOT / "launch/train.py"), "--config", str(config), f"train.output={run}"
        alone = name != "two"
        if alone:
            # Without asserts, and with another hash seed.
            result = call(sys.executable, "-c", WITHOUT_ASSERTS, *command, PYTHONHASHSEED="1")
        else:
            # DeepSpeed's launcher is started by slow tests, and with a typo below.
            result = call_alone(*command, ranks=2)
        assert result.returncode == 0, result.stderr
        assert f"{run}/model.safetensors" in result.stdout
        assert result.stdout.count(f"teacher cache {run}/teacher is valid: 24 pairs embedded again differ") == 1
        assert json.loads((run / "config.json").read_text())["ranks"] == (1 if alone else 2)
        model = open_clip.create_model(tree["model"]["name"], load_weights=False)
        open_clip.load_checkpoint(model, str(run / "model.safetensors"))
    run_ranks(1, train_alone, str(config), f"train.output={tmp_path}/one", init=False)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "one, optimized")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert metrics[0][0]["contrastive_loss"] == pytest.approx(metrics[1][0]["contrastive_loss"], rel=1e-5)


def train_alone(config: str, *overrides: str) -> None:
    """Trains with asserts and without Triton's interpreter."""
    Part.backend = "torch"
    assert train.main(["--config", config, *overrides]) == 0


def test_deepspeed_launcher_returns_exit_code_2(tmp_path: Path) -> None:
    # The rank that reports is the slower one; the launcher ends it once the other has ended.
    late = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(3)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    command = "deepspeed", "--num_accelerators", "2", "launch/train.py", "--config", "demo.json", "modle.name=x"
    result = call(*command, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "unknown key modle; did you mean model?" in errors[0]


def test_cache_command_writes_rejects_and_rebuilds(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny.write_config(tmp_path, max_steps=1)))
    command = [str(ROOT / "launch/cache.py"), "--config", str(config), f"train.output={tmp_path}/run"]
    first = call_alone(*command, ranks=2)
    assert first.returncode == 0, first.stderr
    assert f"{tmp_path}/run/teacher: 24 pairs; 24 pairs embedded again differ by at most " in first.stdout
    assert json.loads((tmp_path / "run/teacher/audit.json").read_text())["pairs"] == 24
    before = (tmp_path / "run/teacher/image.npy").stat()
    refused = call_alone(*command, "data.reference.views=2")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "views: the cache has 1, this run 2" in line
    rebuild = f"--config {config} --rebuild train.output={tmp_path}/run data.reference.views=2"
    assert line.endswith(f"or rebuild it: dive-fast cache {rebuild}")
    assert (tmp_path / "run/teacher/image.npy").stat().st_mtime_ns == before.st_mtime_ns
    rebuilt = call_alone(*command, "data.reference.views=2", "--rebuild", "teacher.audit=0")
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert (tmp_path / "run/teacher/image.npy").stat().st_size > 1.9 * before.st_size


def test_report_error_appends_rebuild_command_for_stale_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    from dive_fast.commands import cli

    parser = cli.parser(None, "")
    words = ["--config", "my config.json", "train.epochs=1", 'data.target.path="a b"']
    stale = StaleCacheError("teacher cache x: changed; rebuild it")
    assert cli.report_error(stale, parser.parse_intermixed_args(words)) == 2
    rebuild = "dive-fast cache --config 'my config.json' --rebuild"
    overrides = """train.epochs=1 'data.target.path="a b"'"""
    assert capsys.readouterr().err == f"error: {stale}: {rebuild} {overrides}\n"
    parser.add_argument("--adopt")
    cli.report_error(stale, parser.parse_intermixed_args([*words, "--adopt", "there"]))
    assert capsys.readouterr().err == f"error: {stale}: {rebuild} --adopt there {overrides}\n"
    cli.report_error(CacheError("missing"), parser.parse_intermixed_args(words))
    assert capsys.readouterr().err == "error: missing\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cli, "REPORT_SECONDS", dict.fromkeys((True, False), 0.0))
    cli.report_error(stale, parser.parse_intermixed_args(words))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        *(({"RANK": rank}, [], "RANK") for rank in ("abc", "-1", "2", " 0")),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "x"}, [], "WORLD_SIZE = 'x'"),
        ({"RANK": "1", "LOCAL_RANK": "1", "GLOO_SOCKET_IFNAME": "none7"}, [], "no network interface none7"),
        ({"RANK": "1", "LOCAL_RANK": "0"}, ["train.epochs=many"], "train.epochs"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, ["train.epochs=many"], None),
    ],
)
def test_rank_without_process_group_reports_its_own_error(
    environment: dict[str, str], arguments: list[str], message: str | None
) -> None:
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
    command = ["launch/train.py", "--config", "demo", *arguments]
    result = run_script(*command, cwd=ROOT, environment=launcher | environment)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert [message in line and line.startswith("rank ") for line in lines] == [True] * (message is not None)


WITHOUT_KEY = {"HOME": "/nowhere", "NETRC": "/nowhere", "WANDB_MODE": "online"}
PARTIAL_LAUNCHES = {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        *((variables, [], "unset") for variables in PARTIAL_LAUNCHES),
        ({"WORLD_SIZE": ""}, ["--dry-run"], "WORLD_SIZE = '': expected a number"),
        ({"WORLD_SIZE": "many"}, ["--dry-run"], "WORLD_SIZE = 'many': expected a number"),
        ({}, ['deepspeed.wandb={"enabled": true}'], 'monitors are not used; set track=["wandb"] instead'),
        (WITHOUT_KEY, ["track=wandb"], "track: wandb has no API key: run `wandb login`"),
        ({}, ["train.output=README.md", "objective.name=flyp"], "train.output = README.md: cannot write there"),
    ],
)
def test_train_reports_machine_or_launcher_error_in_one_line(
    environment: dict[str, str], arguments: list[str], message: str
) -> None:
    command = ["launch/train.py", "--config", "demo", *arguments]
    result = run_script(*command, cwd=ROOT, environment={"DS_ACCELERATOR": "cpu"} | environment)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in result.stderr


def test_dry_run_on_rank_1_says_that_rank_0_prints() -> None:
    result = run_script("launch/train.py", "--config", "demo", "--dry-run", cwd=ROOT, environment={"RANK": "1"})
    assert (result.returncode, result.stdout) == (0, "")
    assert "only rank 0 prints the plan; unset RANK" in result.stderr


def test_missing_config_lists_shipped_configs() -> None:
    result = run_script("launch/train.py", cwd=ROOT)
    assert result.returncode == 2
    assert "shipped configs: demo, " in result.stderr


@pytest.mark.slow
def test_launchers_in_bare_environment_with_non_ascii_names(tmp_path: Path) -> None:
    folder = tmp_path / "\u00fc tel" / "lauf 2"
    folder.mkdir(parents=True)
    tree = tiny.write_config(folder, max_steps=1)
    names = Path(tree["data"]["target"]["class_names"])
    names.write_text("caf\u00e9\nGr\u00f6\u00dfe\n\u732b\nna\u00efve\n\u043a\u043e\u0442\n")
    config = folder / "config.json"
    config.write_text(json.dumps(tree))
    template = 'it\'s a "photo" of {} -4C outside'
    command = ["--config", str(config), f"train.output={folder}/run", f"data.target.templates={template}"]
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LC_ALL": "C",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(tmp_path / "missing"),
        "LOCAL_RANK": "3",  # left over from another job
    }
    for start in (["torchrun", "--nproc_per_node", "2"], ["deepspeed", "--num_accelerators", "2"]):
        run = subprocess.run(
            [*start, "launch/train.py", *command, f"train.output={folder}/{start[0]}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert (folder / start[0] / "model.safetensors").exists()
        saved = json.loads((folder / start[0] / "config.json").read_text())
        assert saved["config"]["data"]["target"]["templates"] == template


def test_typo_outside_of_the_methods_options_is_reported_without_torch() -> None:
    code = (
        "import sys\n"
        "from dive_fast.commands import cli\n"
        "from dive_fast.errors import ConfigError\n"
        "try: cli.load_config('demo.json', ['train.lr=1'])\n"
        "except ConfigError as error: print(error)\n"
        "print([name for name in ('torch', 'open_clip', 'deepspeed') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    message, modules = run.stdout.splitlines()
    assert "unknown key train.lr; did you mean train.learning_rate?" in message
    assert modules == "[]"
