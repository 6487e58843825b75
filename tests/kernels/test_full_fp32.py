"""Products of plain PyTorch keep fp32's precision where the process allows less, and leave its switches alone."""

import pytest
import torch
from inputs import CONTRASTIVE, drifted_pairs, make_inputs, select, to_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from dive_fast.kernels import contrastive, naive
from dive_fast.kernels.precision import full_fp32, product

MATMUL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def by_the_newer_switch(precision):
    MATMUL[0].fp32_precision = precision


def by_both_switches(precision):
    """PyTorch then refuses to say what the older one is, and with some versions to multiply."""
    torch.set_float32_matmul_precision("high")
    MATMUL[0].fp32_precision = precision


def for_all_operations(precision):
    torch.backends.fp32_precision = precision


def by_allow_tf32(allowed):
    """As the variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE of NVIDIA's containers sets it."""
    MATMUL[0].allow_tf32 = allowed


WAYS = [
    pytest.param(torch.set_float32_matmul_precision, "high", id="high"),
    pytest.param(torch.set_float32_matmul_precision, "medium", id="medium"),
    pytest.param(by_allow_tf32, True, id="allow_tf32"),
    pytest.param(by_the_newer_switch, "tf32", id="fp32_precision"),
    pytest.param(by_both_switches, "ieee", id="contradiction"),
    pytest.param(for_all_operations, "tf32", id="generic"),
]


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in MATMUL:
        backend.fp32_precision = "none"


def switches():
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:
        general = "a contradiction"
    return general, *(backend.fp32_precision for backend in MATMUL)


class Products(TorchDispatchMode):
    """What the switches are at each matrix product."""

    def __init__(self):
        super().__init__()
        self.switches = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.switches.append((MATMUL[0].allow_tf32, *switches()))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("switch", "value"), WAYS)
def test_products_are_fp32_whatever_is_allowed(switch, value):
    tensors = to_tensors(select(make_inputs(drifted_pairs, 9, 16), CONTRASTIVE), torch.float32)
    halves, right = torch.rand(2, 9, 16, dtype=torch.float16), torch.rand(16, 5, dtype=torch.float16)
    switch(value)
    before = switches()
    with Products() as products:
        naive.contrastive_loss(**tensors).backward()
        contrastive._matmul(tensors["image_features"][None], tensors["text_features"].T)
        contrastive._matmul(halves, right)
    assert len(products.switches) == 5  # logits, two of their backward, and the two above
    assert set(products.switches) == {(False, "highest", "ieee", "ieee")}
    if before[0] == "a contradiction":
        assert switches()[1:] == before[1:]
    else:
        assert switches() == before


@pytest.mark.parametrize(("switch", "value"), WAYS)
def test_switches_are_put_back_after_an_error(switch, value):
    switch(value)
    before = switches()
    with pytest.raises(RuntimeError, match="shapes"), full_fp32(torch.device("cpu")):
        product(torch.ones(2, 3), torch.ones(2, 4))
    assert switches()[1:] == before[1:]


def test_defaults_are_not_touched():
    before = switches()
    with full_fp32(torch.device("cpu")):
        assert switches() == before
    assert switches() == before


def test_product_is_differentiable_twice_and_ignores_autocast():
    left, right = (torch.rand(count, 3, dtype=torch.float64, requires_grad=True) for count in (2, 4))
    assert torch.autograd.gradcheck(product, (left, right))
    assert torch.autograd.gradgradcheck(product, (left, right))
    rows = torch.rand(8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product(rows, rows).sum().backward()
    expected = 2 * rows.detach().sum(0).expand(8, 8)
    torch.testing.assert_close(rows.grad, expected, rtol=1e-6, atol=0)
