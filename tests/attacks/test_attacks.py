"""Tests of the attacks: random numbers, the threat model, PGD and APGD-CE against the authors' code."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dive_fast.attacks.apgd import apgd_ce, checkpoints
from dive_fast.attacks.pgd import pgd
from dive_fast.attacks.threat import Attacked, Norm, Threat, gradient
from dive_fast.kernels.naive_attacks import philox, uniform

SIDE, CLASSES, COUNT = 8, 5, 40
THREATS = [Threat("linf", 12 / 255), Threat("l2", 0.5)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small network, trained to be right on :func:`data`."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(8 * SIDE**2, CLASSES))
    images, labels = data()
    optimizer = torch.optim.Adam(layers.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layers(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return layers.eval().requires_grad_(False)


def data() -> tuple[Tensor, Tensor]:
    """Random images of rising contrast, and so of rising robustness, with random labels."""
    generator = torch.Generator().manual_seed(1)
    contrast = torch.linspace(0.05, 1.0, COUNT)[:, None, None, None]
    images = 0.5 + contrast * (torch.rand(COUNT, 3, SIDE, SIDE, generator=generator) - 0.5)
    return images, torch.randint(CLASSES, (COUNT,), generator=generator)


def noise(samples: list[int]) -> Tensor:
    return uniform(torch.tensor(samples), (3, SIDE, SIDE), seed=3)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_equals_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in words) == expected


def test_uniform_depends_on_the_sample_alone() -> None:
    both = noise([3, 90])
    assert torch.equal(both[1:], noise([90]))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both[0], uniform(torch.tensor([3]), (3, SIDE, SIDE), seed=3, step=1)[0])
    assert not torch.equal(both[0], uniform(torch.tensor([3]), (3, SIDE, SIDE), seed=4)[0])


def test_uniform_has_the_moments_of_its_distribution() -> None:
    values = uniform(torch.arange(100), (1001,), seed=0)
    assert values.abs().max() < 1
    assert abs(float(values.mean())) < 6 / math.sqrt(3 * values.numel())
    assert abs(float(values.square().mean()) - 1 / 3) < 6 * math.sqrt(4 / 45 / values.numel())


@pytest.mark.parametrize("threat", THREATS)
def test_project_stays_near_and_leaves_allowed_images(threat: Threat) -> None:
    images, _ = data()
    allowed = threat.project(images + 3 * noise(list(range(COUNT))), images)
    check_allowed(allowed, images, threat)
    # A second projection moves by rounding alone.
    torch.testing.assert_close(threat.project(allowed, images), allowed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("attack", ["pgd", "apgd"])
def test_attack_raises_the_loss_within_the_threat(model: nn.Module, threat: Threat, attack: str) -> None:
    images, labels = data()
    attacked = run(attack)(model, images, labels, threat, noise(list(range(COUNT))))
    check_allowed(attacked.images, images, threat)
    clean, tried = gradient(model, images, labels), gradient(model, attacked.images, labels)
    assert torch.equal(tried.is_right, attacked.is_robust)
    torch.testing.assert_close(tried.loss, attacked.loss)
    assert (tried.loss >= clean.loss - 1e-6).all()
    assert attacked.is_finite.all()
    assert 0 < attacked.is_robust.sum() < clean.is_right.sum()


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("attack", ["pgd", "apgd"])
def test_attack_does_not_depend_on_the_batch(model: nn.Module, threat: Threat, attack: str) -> None:
    images, labels = data()
    double = copy.deepcopy(model).double()
    starts = noise(list(range(COUNT))).double()
    together = run(attack)(double, images.double(), labels, threat, starts)
    for piece in (slice(0, 1), slice(7, 20)):
        apart = run(attack)(double, images[piece].double(), labels[piece], threat, starts[piece])
        assert torch.equal(apart.is_robust, together.is_robust[piece])
        if threat.norm == "l2":  # a sign turns the rounding of a batch into a complete step
            torch.testing.assert_close(apart.images, together.images[piece], rtol=0, atol=1e-9)


def test_apgd_computes_only_samples_that_it_attacks(model: nn.Module) -> None:
    images, labels = data()
    sizes: list[int] = []

    def counted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        logits: Tensor = model(images)
        return logits

    attacked = apgd_ce(counted, images, labels, THREATS[0], steps=20, noise=noise(list(range(COUNT))))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[: checkpoints(20)[0] + 1] == [COUNT] * (checkpoints(20)[0] + 1)
    assert attacked.is_robust.sum() <= sizes[-1] < COUNT


def test_gradient_of_some_rows_leaves_the_others(model: nn.Module) -> None:
    images, labels = data()
    complete, part = gradient(model, images, labels), gradient(model, images, labels, torch.tensor([7, 2]))
    for tensor, values in zip(part, complete, strict=True):
        torch.testing.assert_close(tensor[[7, 2]], values[[7, 2]])
    assert part.loss.isinf().sum() == COUNT - 2
    assert part.images.flatten(1).any(1).sum() == 2
    assert part.is_finite.all()


def test_pgd_of_two_steps_equals_the_formula() -> None:
    # One pixel value x, two classes with logits (x, -x): the cross-entropy of class 0 falls with x.
    def logits(images: Tensor) -> Tensor:
        value = images.flatten(1).sum(1, keepdim=True)
        return torch.cat([value, -value], 1)

    clean = torch.tensor([0.5, 0.01]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    label = torch.tensor([0, 0])
    start = torch.full_like(clean, 0.5)
    last = pgd(logits, clean, label, Threat("linf", 0.04), steps=2, step_size=0.03, noise=start, keep_best=False)
    # 0.5 + 0.02 - 0.03 - 0.03 = 0.46; the second image is clipped at 0.
    torch.testing.assert_close(last.images[:, 0, 0, 0], torch.tensor([0.46, 0.0]))
    # At the images before the last step: three values of 0.49, and of 0.
    torch.testing.assert_close(last.loss, torch.tensor([0.0516, 0.6931]), atol=1e-3, rtol=0)
    assert last.is_robust.tolist() == [True, True]
    wrong = pgd(logits, clean, 1 - label, Threat("linf", 0.04), steps=1, step_size=0.03, keep_best=False)
    assert wrong.is_robust.tolist() == [False, False]


@pytest.mark.parametrize("attack", ["pgd", "apgd"])
def test_sample_without_finite_gradient_stays_clean(model: nn.Module, attack: str) -> None:
    images, labels = data()
    images[4, 0, 0, 0] = torch.nan
    attacked = run(attack)(model, images, labels, THREATS[0], noise(list(range(COUNT))))
    assert torch.equal(attacked.images[4].isnan(), images[4].isnan())
    assert attacked.is_finite.tolist() == [sample != 4 for sample in range(COUNT)]
    assert not attacked.is_robust[4]


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_pgd_of_few_steps_keeps_the_best(model: nn.Module, steps: int) -> None:
    images, labels = data()
    attacked = pgd(model, images, labels, THREATS[0], steps=steps, step_size=0.02)
    assert torch.equal(gradient(model, attacked.images, labels).is_right, attacked.is_robust)
    if steps == 0:
        assert torch.equal(attacked.images, images)


def test_parameters_get_no_gradient(model: nn.Module) -> None:
    images, labels = data()
    model.requires_grad_(True)
    try:
        pgd(model, images, labels, THREATS[0], steps=2, step_size=0.02)
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.requires_grad_(False)


def test_checkpoints_of_100_steps_are_those_of_the_paper() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]


@pytest.mark.parametrize("threat", THREATS)
def test_apgd_is_as_strong_as_the_authors_code(model: nn.Module, threat: Threat) -> None:
    autoattack = pytest.importorskip("pyautoattack.autopgd_base")
    images, labels = data()
    ours = apgd_ce(model, images, labels, threat, noise=noise(list(range(COUNT))))
    name = {"linf": "Linf", "l2": "L2"}[threat.norm]
    attack = autoattack.APGDAttack(
        model, norm=name, eps=threat.eps, n_iter=100, n_restarts=1, seed=0, device="cpu"
    )
    theirs = gradient(model, attack.perturb(images, labels), labels).is_right
    right = gradient(model, images, labels).is_right
    assert (ours.is_robust & right).sum() <= (theirs & right).sum() + 1


def run(attack: str) -> Callable[[nn.Module, Tensor, Tensor, Threat, Tensor], Attacked]:
    """An attack with few steps."""
    if attack == "apgd":
        return lambda model, images, labels, threat, start: apgd_ce(
            model, images, labels, threat, steps=20, noise=start
        )
    return lambda model, images, labels, threat, start: pgd(
        model, images, labels, threat, steps=10, step_size=threat.eps / 4, noise=start
    )


def check_allowed(images: Tensor, clean: Tensor, threat: Threat) -> None:
    """Validates the distance to the clean images, and the range of values."""
    change = (images - clean).flatten(1)
    distance: dict[Norm, Tensor] = {"linf": change.abs().amax(1), "l2": change.norm(dim=1)}
    assert (distance[threat.norm] <= threat.eps * (1 + 1e-5)).all()
    assert images.min() >= 0
    assert images.max() <= 1
