"""Launches after the first find the kernel that Triton would choose, and hand it the same arguments."""

import os
import subprocess
import sys

SCRIPT = """
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from dive_fast.kernels import primitives


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Driver:
    launches = []

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
        load_binary = staticmethod(lambda name, binary, *rest: (1, hash(binary), 0, 0, 1024))
        unload_module = staticmethod(lambda module: None)

    @staticmethod
    def launcher_cls(source, metadata):
        # Grid, stream and function; without the hooks' arguments, which are new objects in each launch.
        return lambda *arguments: Driver.launches.append((metadata.hash, *arguments[:6], *arguments[9:]))

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)


driver.set_active(Driver())


@triton.jit(do_not_specialize=["free"], do_not_specialize_on_alignment=["scale"])
def add_kernel(pair, scale, maybe, free, count, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    o = tl.arange(0, SIZE)
    b = tl.load(pair.x + o, mask=o < count) * tl.load(scale) + free + SHIFT
    if maybe is not None:
        b += tl.load(maybe + o)
    tl.store(pair.y + o, b, mask=o < count)


memory = torch.empty(256)
x, y, z = memory[:64], memory[64:128], memory[128:]
cases = {
    "first": (Pair(x, y), z[:1], None, 3, 5),
    "other integers of the same kind": (Pair(x, y), z[:1], None, 16, 7),
    "scale at another alignment": (Pair(x, y), z[1:2], None, 3, 5),
    "integer of 64 bits": (Pair(x, y), z[:1], None, 2**40, 5),
    "count of one": (Pair(x, y), z[:1], None, 3, 1),
    "count divisible by 16": (Pair(x, y), z[:1], None, 3, 32),
    "pair at another alignment": (Pair(x[1:], y), z[:1], None, 3, 5),
    "pair of another dtype": (Pair(x.half(), y), z[:1], None, 3, 5),
    "scale of another dtype": (Pair(x, y), z[:1].double(), None, 3, 5),
    "optional tensor": (Pair(x, y), z[:1], z, 3, 5),
    "optional tensor at another alignment": (Pair(x, y), z[:1], z[1:], 3, 5),
}
shifts = (1.5,)


def launch(case, shift, cached):
    if not cached:
        primitives._compiled.clear()
    primitives.launch(add_kernel, 9, *cases[case], SIZE=64, SHIFT=shift, num_warps=2)
    return Driver.launches[-1]


expected = {(case, shift): launch(case, shift, False) for case in cases for shift in shifts}
primitives._compiled.clear()
for _ in range(3):  # the first round fills the cache
    for key, launched in expected.items():
        actual = launch(*key, True)
        assert len(actual) == len(launched), key
        for value, other in zip(actual, launched):
            assert value is other or value == other, (key, value, other)
# Cases of one kind share a kernel, the others do not.
assert len(primitives._compiled) == len({launched[0] for launched in expected.values()}) == len(cases) - 2
print("passed")
"""


def test_cached_launches_equal_tritons(tmp_path):
    script = tmp_path / "launches.py"  # Triton reads the source of a kernel from its file
    script.write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "passed\n", run.stdout + run.stderr
