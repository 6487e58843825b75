"""Running functions on several ranks, as tests do."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks


def sum_over_ranks(values):
    total = values + dist.get_rank()
    dist.all_reduce(total)
    return {"total": total, "threads": torch.get_num_threads()}


def initialise_from_environment():
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    sizes = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    return sizes, [int(os.environ[name]) for name in names]


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ArithmeticError("the cause")
    dist.barrier()


def hang():
    time.sleep(600)


def die_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(7)


def return_a_lambda():
    return lambda: None


def test_run_ranks_returns_results_in_rank_order():
    results = run_ranks(2, sum_over_ranks, torch.ones(3))
    assert [result["threads"] for result in results] == [1, 1]
    for result in results:
        assert torch.equal(result["total"], torch.full((3,), 3.0))


def test_function_may_join_by_the_environment():
    results = run_ranks(2, initialise_from_environment, init=False)
    assert results == [((0, 2), [0, 0, 2, 2]), ((1, 2), [1, 1, 2, 2])]


START_ANOTHER = """
import subprocess, sys
from dive_fast.distributed import join
print(join())
if sys.argv[1:]:
    sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""


def test_join_alone_leaves_the_environment_to_children(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-P", "-c", START_ANOTHER, START_ANOTHER]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Ranks(rank=0, world_size=1, ") == 2


SWITCHES = """
from dive_fast import numerics
before = numerics.state()
from dive_fast.distributed import join
join()
print(before["matmul_tf32"], sorted(set(numerics.state().values())))
"""


def test_join_configures_numerics_in_a_container_that_enables_tf32(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    run = subprocess.run([sys.executable, "-P", "-c", SWITCHES], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("True [False]\n"), run.stdout


def test_error_of_a_rank_has_its_traceback_and_comes_first():
    with pytest.raises(RuntimeError, match=r"^rank 1 raised\n(.*\n)*.*in fail_on_rank_1\n(.*\n)*.*the cause"):
        run_ranks(2, fail_on_rank_1)


def test_rank_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        run_ranks(2, die_on_rank_1)


@pytest.mark.slow  # the timeout has to outlast the start of a process on a busy machine
def test_rank_that_hangs_is_stopped_with_its_stack():
    with pytest.raises(TimeoutError, match=r"^rank 0 ran out of time at\n(.*\n)*.*in hang\n"):
        run_ranks(1, hang, init=False, timeout=20)


def test_unpicklable_result_is_an_error_of_the_rank():
    with pytest.raises(RuntimeError, match=r"^rank 0 raised\n(.*\n)*.*pickle"):
        run_ranks(1, return_a_lambda)
