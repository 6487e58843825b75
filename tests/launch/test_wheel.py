"""The wheel, installed outside of the repository: its contents, its command, the losses without the engine."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("dive_fast", "kernels", "launch")
ENGINE = ("deepspeed", "open_clip", "pydantic", "safetensors", "torchvision", "transformers", "yaml")
"""Packages of the extra ``train``."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    # A copy, since setuptools builds inside of the source, where files of older builds would stay.
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = source.glob("dive_fast-*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    shutil.copy(wheel, site)
    return site


def run(site: Path, *command: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs Python with the installed wheel before the repository."""
    environment = os.environ | {"PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_wheel_contains_package_configs_and_types(site: Path) -> None:
    (wheel,) = site.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dive_fast").rglob("*.py")}
    modules |= {f"dive_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    modules |= {f"dive_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "launch").rglob("*.py")}
    assert modules - names == set()
    configs = {f"dive_fast/launch/configs/{path.name}" for path in (ROOT / "launch/configs").iterdir()}
    data = {"dive_fast/py.typed", "dive_fast/__init__.pyi", "dive_fast/demo/model/open_clip_model.safetensors"}
    data |= {"dive_fast/evaluation/published.tsv", "dive_fast/methods/starft_backgrounds.txt"}
    assert configs | data <= names
    others = {name.partition("/")[0] for name in names}
    assert {name for name in others if not name.startswith("dive_fast")} == set()


def require_no_noise(completed: subprocess.CompletedProcess[str]) -> None:
    assert completed.returncode == 0, completed.stderr
    assert "Traceback" not in completed.stderr
    assert "INFO" not in completed.stderr + completed.stdout  # of DeepSpeed's launcher
    assert "accelerator" not in completed.stderr + completed.stdout


@pytest.mark.slow
def test_training_runs_from_the_wheel(site: Path, tmp_path: Path) -> None:
    version = run(site, str(site / "bin/dive-fast"), "--version", cwd=tmp_path)
    assert version.stdout == f"dive_fast {metadata.version('dive_fast')}\n"
    options = ("objective.name=flyp", "train.max_steps=1", "evaluate.sets={}", "evaluate.probe=0")
    done = run(
        site, "-m", "dive_fast", "train", "--config", "demo", *options, "train.output=runs/one", cwd=tmp_path
    )
    require_no_noise(done)
    assert (tmp_path / "runs/one/model.safetensors").exists()


@pytest.mark.slow
def test_demo_runs_from_the_wheel(site: Path, tmp_path: Path) -> None:
    demo = run(site, "-m", "dive_fast", "demo", "--steps", "2", cwd=tmp_path)
    require_no_noise(demo)
    assert (tmp_path / "runs/demo/report.png").exists()
    assert {"pre-trained", "FLYP", "DiVE"} <= {line.split()[0] for line in demo.stdout.splitlines() if line}


def test_losses_need_no_package_of_the_engine(site: Path, tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys({ENGINE!r}))  # None: cannot be imported
        import torch, dive_fast
        assert dive_fast.__file__.startswith({str(site)!r}), dive_fast.__file__
        rows = torch.eye(4, requires_grad=True)
        dive_fast.contrastive_loss(rows, rows, torch.ones(())).backward()
        print(rows.grad.shape)
        sys.argv = ["dive-fast", "train", "--config", "demo"]
        from dive_fast.commands.console import main
        sys.exit(main())
    """
    completed = run(site, "-c", code, cwd=tmp_path)
    assert completed.stdout == "torch.Size([4, 4])\n"
    assert completed.returncode == 2
    (line,) = completed.stderr.splitlines()
    assert line.startswith("error: dive-fast train needs the package ")
    assert line.endswith("pip install 'dive_fast[train]'")


@pytest.mark.slow
def test_module_runs_under_deepspeed(site: Path, tmp_path: Path) -> None:
    command = ["-m", "deepspeed.launcher.runner", "-q", "--num_accelerators", "1", "--module"]
    completed = run(site, *command, "dive_fast.launch.train", "--config", "demo", "modle.name=x", cwd=tmp_path)
    assert completed.returncode == 2
    assert "unknown key modle" in completed.stderr
