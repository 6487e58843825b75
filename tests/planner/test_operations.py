"""Work of single operations against bytes and FLOP counted by hand, and the time model."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dive_fast.kernels import contrastive_loss, distillation_loss
from dive_fast.planner.gpu_specs import GPUS
from dive_fast.planner.memory_tracker import Tracker
from dive_fast.planner.operations import Operation
from dive_fast.planner.plan import LAUNCH_SECONDS, TRITON_SECONDS, Plan

H200 = GPUS["h200"]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=grad)


def half(*shape: int, grad: bool = False) -> Tensor:
    return tensor(*shape, dtype=torch.float16, grad=grad)


def indices(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.long)


def operations(function: Callable[..., Any], *arguments: Any) -> Counter[Operation]:
    with Tracker() as tracker:
        function(*arguments)
    return tracker.operations


def elementwise_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    counts = operations(function, *arguments).items()
    return sum(count * each.bytes for each, count in counts if each.kind == "elementwise")


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (torch.add, (half(30, 7), half(30, 7)), 3 * 210 * 2),
        (torch.mul, (half(30, 7), 1.702), 2 * 210 * 2),
        (torch.mul, ((x := half(30, 7)), x), 2 * 210 * 2),
        (torch.add, (half(30, 7), tensor(7)), 210 * 2 + 7 * 4 + 210 * 4),
        (Tensor.add_, (tensor(30, 7), tensor(30, 7)), 3 * 210 * 4),
        (Tensor.mul_, (tensor(30, 7), 2.0), 2 * 210 * 4),
        (Tensor.zero_, (tensor(30, 7),), 210 * 4),
        (Tensor.copy_, (tensor(30, 7), half(30, 7)), 210 * 2 + 210 * 4),
        (Tensor.float, (half(30, 7),), 210 * 2 + 210 * 4),
        (torch.sum, (half(30, 7), 0), 210 * 2 + 7 * 2),
        (torch.zeros, (30, 7), 210 * 4),
        (torch.cat, ([half(3, 7), half(5, 7)],), 2 * 8 * 7 * 2),
        (lambda x: x.t().contiguous(), (half(30, 7),), 2 * 210 * 2),
        (lambda x: x.expand(30, 7).contiguous(), (half(1, 7),), 7 * 2 + 210 * 2),
        # Views, and allocations, move nothing.
        (lambda x: x.t().view(7, 5, 6).transpose(1, 2)[2:, None].detach(), (half(30, 7),), 0),
        (lambda x: x.new_empty(9, 9) is None or torch.empty_like(x), (half(30, 7),), 0),
        # Gathers read the rows that they return.
        (F.embedding, (indices(5), tensor(1000, 7)), 5 * 8 + 2 * 5 * 7 * 4),
        (lambda x, rows: x[rows], (tensor(1000, 7), indices(5)), 5 * 8 + 2 * 5 * 7 * 4),
        (torch.index_select, (tensor(1000, 7), 0, indices(5)), 5 * 8 + 2 * 5 * 7 * 4),
        (Tensor.index_add_, (tensor(1000, 7), 0, indices(5), tensor(5, 7)), 5 * 8 + 3 * 5 * 7 * 4),
        # Lists of tensors.
        (torch._foreach_mul_, ([tensor(30), tensor(7)], 2.0), 2 * 37 * 4),
        (torch._foreach_add, ([tensor(30), tensor(7)], [tensor(30), tensor(7)]), 3 * 37 * 4),
        (torch._foreach_zero_, ([tensor(30), tensor(7)],), 37 * 4),
        # Mean and reciprocal deviation of each row are fp32.
        (F.layer_norm, (tensor(30, 7), (7,), tensor(7), tensor(7)), 2 * 210 * 4 + 2 * 7 * 4 + 2 * 30 * 4),
    ],
)  # fmt: skip
def test_operation_moves_bytes_counted_by_hand(
    function: Callable[..., Any], arguments: tuple[Any, ...], expected: int
) -> None:
    assert elementwise_bytes(function, *arguments) == expected
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert elementwise_bytes(function, *arguments) == expected


def test_backward_of_slice_fills_zeros_and_copies_gradient() -> None:
    x = tensor(3, 30, 7, grad=True)
    with Tracker() as tracker:
        x[1].backward(tensor(30, 7))
    (operation,) = [each for each in tracker.operations if each.name == "select_backward"]
    assert operation.bytes == 3 * 210 * 4 + 2 * 210 * 4


def test_fused_adamw_reads_and_writes_parameters_gradients_and_moments() -> None:
    parameters = [tensor(30, 7, grad=True), tensor(11, grad=True)]
    optimizer: Any = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with Tracker() as tracker:
        optimizer.step()
    (operation,) = [each for each in tracker.operations if each.name == "_fused_adamw_"]
    # The kernel may unscale the gradients in place. There is a step of 4 bytes for each parameter.
    assert operation.bytes == pytest.approx(4 * 2 * 221 * 4, abs=2 * 2 * 4)


@pytest.mark.parametrize(
    ("function", "arguments", "flop", "moved", "reduction"),
    [
        (torch.mm, (half(30, 7), half(7, 11)), 2 * 30 * 7 * 11, 2 * (210 + 77 + 330), 7),
        (torch.bmm, (half(5, 30, 70), half(5, 70, 11)), 5 * 2 * 30 * 70 * 11, 5 * 2 * (2100 + 770 + 330), 70),
        (F.linear, (half(30, 7), half(11, 7), half(11)), 2 * 30 * 7 * 11, 2 * (210 + 77 + 330 + 11), 7),
        (F.linear, (half(3, 10, 7), half(11, 7), half(11)), 2 * 30 * 7 * 11, 2 * (210 + 77 + 330 + 11), 7),
        (F.conv2d, (half(2, 3, 8, 8), half(50, 3, 4, 4), None, 4), 2 * 8 * 48 * 50, 2 * (384 + 2400 + 400), 48),
    ],
)
def test_product_has_flop_bytes_and_reduction(
    function: Callable[..., Any], arguments: tuple[Any, ...], flop: int, moved: int, reduction: int
) -> None:
    (operation,) = operations(function, *arguments)
    assert operation[1] == "product"
    assert operation[3:] == (True, flop, moved, reduction, False)


def test_attention_is_counted_apart_from_products() -> None:
    query, key, value = (half(2, 3, 5, 8, grad=True) for _ in range(3))
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        F.scaled_dot_product_attention(query, key, value).backward(half(2, 3, 5, 8))
    attention = [each for each in tracker.operations if each.kind == "attention"]
    forward = 2 * 2 * (2 * 3 * 5 * 5 * 8)
    assert sorted(each.flop for each in attention) == [forward, forward * 5 // 2]
    assert all(each.is_half for each in attention)
    assert not any(each.kind == "product" for each in tracker.operations)


def test_loss_kernels_have_their_own_stage_and_products() -> None:
    rows, width = 256, 64
    with FakeTensorMode(), Tracker() as tracker:
        tracker.stage = "reference"
        features = [half(rows, width, grad=True) for _ in range(2)]
        contrastive_loss(*features, torch.ones(()), backend="triton").backward()
    losses = [each for each in tracker.operations if each.stage == "loss"]
    assert [(each.kind, each.is_triton) for each in losses] == [("product", True)] * 2
    assert sum(each.flop for each in losses) == 6 * 2 * rows**2 * width


@pytest.mark.parametrize(
    ("weights", "products"),
    [({"relational_weight": 1.0}, 10), ({"cross_weight": 1.0}, 10), ({"feature_weight": 1.0}, 0)],
)
def test_distillation_losses_multiply_fp32_rows(weights: dict[str, float], products: int) -> None:
    rows, width = 256, 64
    with FakeTensorMode(), Tracker() as tracker:
        features = [half(rows, width, grad=True) for _ in range(2)]
        teachers = [torch.ones(rows, width) for _ in range(2)]
        scale = torch.ones(())
        distillation_loss(*features, scale, *teachers, scale, **weights, backend="triton").loss.backward()
    losses = [each for each in tracker.operations if each.stage == "loss"]
    assert len(losses) == 2
    assert sum(each.flop for each in losses) == products * 2 * rows**2 * width
    assert not any(each.is_half for each in losses)
    # The weights of all rows and columns, both sides, and their sums, in fp32.
    sums = 0 if "feature_weight" in weights else 2 * rows * (rows + width) * 4
    assert tracker.workspace == sums


def operation(kind: Any, **fields: Any) -> Operation:
    work = {"is_half": True, "flop": 0, "bytes": 0, "reduction": 0} | fields
    return Operation("target", kind, "name", **work)


def test_seconds_of_plan_by_part() -> None:
    work: dict[Operation, float] = {
        operation("product", flop=10**15, reduction=640): 2,
        # A product of few FLOP takes the time of its bytes, one in fp32 that of the other units.
        operation("product", flop=10**6, bytes=43 * 10**9, reduction=640): 1,
        operation("product", flop=10**12, is_half=False): 1,
        operation("attention", flop=107 * 10**12): 1,
        operation("elementwise", bytes=41 * 10**9): 3,
        operation("elementwise", is_triton=True): 2,
    }
    plan = Plan(1, 2, work, {})
    seconds = plan.seconds(H200)
    rate = H200.product_rate(640)
    assert rate == pytest.approx(645e12, rel=1e-3)
    assert seconds.product == pytest.approx(2e15 / rate + 0.01 + 1e12 / 50.25e12)
    assert seconds.attention == pytest.approx(0.5)
    assert seconds.elementwise == pytest.approx(0.03)
    assert plan.launches == 10
    assert seconds.host == pytest.approx(8 * LAUNCH_SECONDS + 2 * TRITON_SECONDS)
    assert plan.step_seconds(H200) == seconds.device == seconds.product + seconds.attention + seconds.elementwise
    assert plan.efficiency(H200) == pytest.approx((2e15 + 10**6 + 108e12) / (seconds.device * 989e12))
    assert plan.bytes_of("target") == plan.bytes_of() == 123 * 10**9
    many = Plan(1, 1, {operation("elementwise", bytes=4): 10**6}, {})
    assert many.step_seconds(H200) == many.seconds(H200).host == 10**6 * LAUNCH_SECONDS


def test_assumed_rates_are_proportional_to_data_sheets() -> None:
    for gpu in GPUS.values():
        assert gpu.half_product / gpu.half == pytest.approx(H200.half_product / H200.half)
        assert gpu.elementwise < gpu.copy
    assert GPUS["h100"].elementwise / H200.elementwise == pytest.approx(3.35 / 4.8)
    assert GPUS["h100"].half_product == H200.half_product
