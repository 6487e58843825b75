"""Products of plain PyTorch keep fp32's precision under reduced-precision settings, and restore the settings."""

import pytest
import torch
from inputs import CONTRASTIVE, drifted_pairs, make_inputs, select, to_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from dive_fast.kernels import contrastive, naive, primitives
from dive_fast.kernels.precision import full_fp32, product

MATMUL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def set_fp32_precision(precision):
    MATMUL[0].fp32_precision = precision


def set_both(precision):
    """Sets contradicting values: PyTorch then refuses to read the older setting, some versions to multiply."""
    torch.set_float32_matmul_precision("high")
    MATMUL[0].fp32_precision = precision


def set_generic(precision):
    torch.backends.fp32_precision = precision


def set_allow_tf32(allowed):
    """Sets the flag as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE does in NVIDIA's containers."""
    MATMUL[0].allow_tf32 = allowed


SETTERS = [
    pytest.param(torch.set_float32_matmul_precision, "high", id="high"),
    pytest.param(torch.set_float32_matmul_precision, "medium", id="medium"),
    pytest.param(set_allow_tf32, True, id="allow_tf32"),
    pytest.param(set_fp32_precision, "tf32", id="fp32_precision"),
    pytest.param(set_both, "ieee", id="contradiction"),
    pytest.param(set_generic, "tf32", id="generic"),
]


@pytest.fixture(autouse=True)
def restore_defaults():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in MATMUL:
        backend.fp32_precision = "none"


def read_settings():
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:
        general = "contradiction"
    return general, *(backend.fp32_precision for backend in MATMUL)


class RecordSettings(TorchDispatchMode):
    """Records the settings at each matrix product."""

    def __init__(self):
        super().__init__()
        self.settings = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.settings.append((MATMUL[0].allow_tf32, *read_settings()))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("setter", "value"), SETTERS)
def test_products_are_fp32_under_any_setting(setter, value, monkeypatch):
    tensors = to_tensors(select(make_inputs(drifted_pairs, 9, 16), CONTRASTIVE), torch.float32)
    monkeypatch.setattr(primitives, "launch", lambda *_, **__: None)
    monkeypatch.setattr(contrastive, "SETTINGS", contrastive.Settings(gradient="chunked"))
    setter(value)
    before = read_settings()
    with RecordSettings() as products:
        naive.contrastive_loss(**tensors).backward()
        for dtype in torch.float32, torch.bfloat16:
            features, scale = torch.rand(9, 16, dtype=dtype), torch.ones(())
            _, *saved = contrastive.launch_forward(features, features, scale, "")
            contrastive.launch_backward(scale, scale, *saved, 9, 9, 0, 16)
    # Logits and two products of their backward; in each dtype the sums of both sides.
    assert len(products.settings) == 3 + 2 * 2
    assert set(products.settings) == {(False, "highest", "ieee", "ieee")}
    if before[0] == "contradiction":
        assert read_settings()[1:] == before[1:]
    else:
        assert read_settings() == before


@pytest.mark.parametrize(("setter", "value"), SETTERS)
def test_settings_are_restored_after_an_error(setter, value):
    setter(value)
    before = read_settings()
    with pytest.raises(RuntimeError, match="shapes"), full_fp32(torch.device("cpu")):
        product(torch.ones(2, 3), torch.ones(2, 4))
    assert read_settings()[1:] == before[1:]


def test_default_settings_are_not_changed():
    before = read_settings()
    with full_fp32(torch.device("cpu")):
        assert read_settings() == before
    assert read_settings() == before


def test_product_is_twice_differentiable_and_ignores_autocast():
    left, right = (torch.rand(count, 3, dtype=torch.float64, requires_grad=True) for count in (2, 4))
    assert torch.autograd.gradcheck(product, (left, right))
    assert torch.autograd.gradgradcheck(product, (left, right))
    rows = torch.rand(8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product(rows, rows).sum().backward()
    expected = 2 * rows.detach().sum(0).expand(8, 8)
    torch.testing.assert_close(rows.grad, expected, rtol=1e-6, atol=0)
