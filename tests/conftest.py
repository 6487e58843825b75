"""Puts this folder on the import path, so that every test can say ``from distributed import run_ranks``.

The folders of tests are not packages on purpose: pytest would put the top of the repository on the path, and
its ``kernels`` would hide Hugging Face's package of that name.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch asks for a GPU: ranks of tests run on the CPU, on a machine with GPUs too. DIVE_TEST_GPU=1, which
# `make gpu-check` sets, leaves them to the tests of kernels and engine.
if "DIVE_TEST_GPU" not in os.environ:
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")

import interpreted
import numpy as np
import pytest
import torch

# Before anything imports Hugging Face's hub, which reads it once: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Without a GPU the Triton kernels run under the interpreter, which has to be said before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

interpreted.speed_up()

# Tiny tensors: on a busy machine, threads mostly wait for one another. In what tests start too: sums of more
# threads have other bits, and a run that is alone would take all cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONG = (
    "test_step.py",
    "test_matrix.py",
    "test_wheel.py",
    "test_launch.py",
    "test_option_combinations.py",
    "test_resume.py",
    "test_loop.py",
    "test_validation.py",
    "test_run_folder_as_model.py",
)
"""Files that take tens of seconds, longest first. They start first, so that no worker waits for one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves tests of long files to the front; workers take the files in this order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds all generators, so that a test draws the same numbers whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _state() -> dict[str, Any]:
    """State shared by all tests of a process, which no test may leave changed."""
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "HOME",
        "PATH",
        "CUDA_VISIBLE_DEVICES",
    )
    return {
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "group": torch.distributed.is_initialized(),
        "products": torch.get_float32_matmul_precision(),
        "environment": {name: os.environ.get(name) for name in names},
    }


@pytest.fixture(autouse=True)
def _nothing_left_changed() -> Iterator[None]:
    before = _state()
    yield
    assert _state() == before, "the test leaves something changed that others rely on"


REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures."""
    folder = Path(os.environ.get("DIVE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "imagenet_samples" / "imagenet_samples.tar").is_file():
        pytest.skip(f"no real images in {folder}: set DIVE_TEST_DATA")
    return folder
