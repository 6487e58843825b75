"""The precision benchmark: rounding as in hardware, and no differences between fp32 and fp32."""

from pathlib import Path

import precision
import pytest
import rounding
import torch
from precision import FIGURES, Case, Results, Subject, compare, noise_floor, true_gradient

from dive_fast.kernels import naive

HERE = torch.device("cpu")
CASE = Case("demo", "random", 1e-2, 6, "fp16")

needs_photos = [
    pytest.mark.realdata,
    pytest.mark.skipif(not precision.DATA.is_dir(), reason=f"no real images in {precision.DATA}"),
]


@pytest.fixture(scope="module")
def subject() -> Subject:
    precision.PIECE, precision.NOISE_PAIRS, precision.TUNING_STEPS = 4, 6, 1
    return Subject("demo", None, None)


def test_rounded_to_tf32_has_fp16_mantissa_and_fp32_range() -> None:
    # In fp16's normal range both round equally, except for ties, which random numbers do not hit.
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    numbers = numbers[numbers.abs() > 2**-14]
    assert torch.equal(rounding.rounded_to_tf32(numbers), numbers.half().float())
    assert rounding.rounded_to_tf32(torch.tensor([1e30])).isfinite().all()
    away = rounding.rounded_to_tf32(torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23]))
    assert away.tolist() == [1 + 2**-10, -1 - 2**-10, 1.0]


def test_products_round_factors_and_results_and_sum_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 70), (33, 70), (33,)))
    for leaf in (x, weight):
        leaf.requires_grad_()
    with rounding.products("fp16", HERE), torch.autocast("cpu", torch.float16):
        actual = torch.nn.functional.linear(x, weight, bias)
        gradients = torch.autograd.grad(actual.float().square().sum(), (x, weight))
    exact = x.half().float() @ weight.half().float().T + bias.half().float()
    assert torch.equal(actual, exact.half())
    with torch.autocast("cpu", torch.float16):
        real = torch.nn.functional.linear(x, weight, bias)
    assert torch.allclose(actual.float(), real.float(), rtol=2**-9, atol=2**-9)
    upstream = (2 * actual.float()).half().float()
    assert torch.equal(gradients[0], (upstream @ weight.half().float()).half().float())
    with rounding.products("tf32", HERE):
        actual = torch.nn.functional.linear(x, weight, bias)
    factors = rounding.rounded_to_tf32(x), rounding.rounded_to_tf32(weight).T
    assert torch.allclose(actual, torch.addmm(bias, *factors), atol=1e-5)
    assert not torch.allclose(actual, torch.addmm(bias, x, weight.T), atol=1e-5)


@pytest.mark.usefixtures("subject")
class TestStudy:
    pytestmark = needs_photos

    def test_compare_fp32_with_itself_is_exact(self, subject: Subject) -> None:
        case = CASE._replace(precision="fp32")
        figures = compare(subject, case, true_gradient(subject, case))
        assert figures["u"] == pytest.approx(case.norm, rel=0.05)
        assert figures["image_noise"] == figures["text_noise"] == 0
        for name in ("cosine", "norm_ratio", "loss_ratio"):
            assert figures[name] == pytest.approx(1, abs=1e-6), name
        assert set(figures) == set(FIGURES)

    def test_true_gradient_in_pieces_equals_batch(self, subject: Subject) -> None:
        truth = true_gradient(subject, CASE)
        (batch,) = precision.batches(subject.reference, range(CASE.batch), CASE.batch)
        pairs = subject.towers.encode_pairs(batch.images, batch.text)
        loss = naive.difference_loss(*pairs, *truth.frozen, truth.average).loss
        assert loss.item() == pytest.approx(truth.loss, rel=1e-4)
        for actual, expected in zip(
            truth.gradient, torch.autograd.grad(loss, subject.parameters, allow_unused=True), strict=True
        ):
            expected = torch.zeros_like(actual) if expected is None else expected
            # |u| is 1e-2, so its relative error in fp32 is about 1e-5.
            assert torch.allclose(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())

    def test_compare_bf16_noise_is_eight_times_fp16(self, subject: Subject) -> None:
        truth = true_gradient(subject, CASE)
        fp16, bf16 = (compare(subject, CASE._replace(precision=p), truth) for p in ("fp16", "bf16"))
        assert 0.9 < bf16["cosine"] < fp16["cosine"] < 1
        for half in ("image_noise", "text_noise"):
            assert 4 < bf16[half] / fp16[half] < 16

    def test_noise_floor_is_lower_with_remedy(self, subject: Subject) -> None:
        floor = {(row["precision"], row["remedy"]): row for row in noise_floor(subject)}
        assert floor["fp16", "text"]["text_noise"] == 0
        assert floor["fp16", "text"]["image_noise"] == floor["fp16", "none"]["image_noise"]
        assert floor["fp16", "residual"]["text_noise"] == floor["fp16", "none"]["text_noise"]
        for half in ("image_noise", "text_noise"):
            reduced, noise = floor["fp16", "residual + head"][half], floor["fp16", "none"][half]
            # The remedy keeps the blocks' rounding, which is nearly all of this small model's noise on some CPUs.
            assert reduced != noise
            assert 0 < reduced < 1.02 * noise
        # Hooks and modes are removed.
        assert subject.towers.autocast is None
        assert not subject.towers.visual.ln_pre._forward_hooks

    def test_compare_fp16_cache_adds_rounding(self, subject: Subject) -> None:
        case = CASE._replace(precision="fp32", teacher="fp16 cache")
        assert 0.999 < compare(subject, case, true_gradient(subject, case))["cosine"] < 1 - 1e-7


def test_results_reads_finished_cases(tmp_path: Path) -> None:
    results = Results(tmp_path / "precision.json")
    results.cases.append({**CASE._asdict(), **dict.fromkeys(FIGURES, 0.5)})
    results.write()
    reopened = Results(tmp_path / "precision.json")
    assert reopened.has(CASE)
    assert not reopened.has(CASE._replace(norm=3e-3))
    assert "| demo | random | 0.01 | 6 | fp16 | none | fp32 | settled | 0.5 |" in reopened.tables()
