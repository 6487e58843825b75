"""Each rule around torch's fused AdamW, without DeepSpeed: published numbers, the float64 oracle, edge cases."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weight_space_oracle import Oracle

from dive_fast.config.schema import ProjectionConfig
from dive_fast.engine.weight_projection import WeightProjection
from dive_fast.errors import ConfigError
from dive_fast.projections import rules
from dive_fast.projections.anchored_group import PREVIOUS, AnchoredGroup, Layout
from dive_fast.projections.flat_group import FlatGroup

RATE = 0.1
A = [[1.0, 2.0], [2.0, 1.0], [-1.0, -2.0], [2.0, 1.0], [3.0, -1.0]]
"""Gradients of the reference trajectories, which start at [1, -1]."""
SPD_GRADIENTS = [[1.0, 2.0], [2.0, 1.0], [-0.5, -0.25], [1.0, 1.0]]
SHAPES = {"vector": (5,), "one": (1,), "matrix": (3, 4), "kernel": (2, 3, 2, 2)}
RULES: dict[str, dict[str, Any]] = {
    "digrap": {"name": "digrap", "mu": 0.5},
    "digrap row": {"name": "digrap", "mu": 0.5, "cosine": "row"},
    "digrap current": {"name": "digrap", "mu": 0.5, "direction": "current"},
    "digrap row current": {"name": "digrap", "mu": 0.5, "cosine": "row", "direction": "current"},
    "spd": {"name": "spd", "strength": 0.5},
    "spd past the anchor": {"name": "spd", "strength": 20.0},
    "ftp": {"name": "ftp", "k": 1.0},
    "ftp half": {"name": "ftp", "k": 0.5},
    "ftp never shrinks": {"name": "ftp", "k": 0.0},
    "l2sp": {"name": "l2sp", "strength": 0.5},
    "l2sp decoupled": {"name": "l2sp", "strength": 0.5, "form": "decoupled"},
}
INERT: dict[str, dict[str, Any]] = {
    "digrap": {"name": "digrap", "mu": 0.0},
    "digrap row": {"name": "digrap", "mu": 0.0, "cosine": "row"},
    "digrap current": {"name": "digrap", "mu": 0.0, "direction": "current"},
    "spd": {"name": "spd", "strength": 0.0},
    "l2sp": {"name": "l2sp", "strength": 0.0},
    "l2sp decoupled": {"name": "l2sp", "strength": 0.0, "form": "decoupled"},
}


class Run:
    """Parameters under fused AdamW and a rule, on gradients that the test gives."""

    def __init__(self, weights: dict[str, Tensor], options: dict[str, Any] | None, **adamw: Any) -> None:
        self.module = nn.ParameterDict({name: nn.Parameter(w.clone()) for name, w in weights.items()})
        adamw = {"lr": RATE, "weight_decay": 0.0} | adamw
        self.optimizer: Any = torch.optim.AdamW(self.module.parameters(), fused=True, **adamw)
        self.projection: WeightProjection | None = None
        if options is not None:
            rule = rules.create(ProjectionConfig(**options))
            assert rule is not None
            engine = SimpleNamespace(zero_optimization_stage=lambda: 0)
            self.projection = WeightProjection(rule, engine, self.optimizer, self.module, True, "torch")

    def step(self, gradients: dict[str, Tensor], scale: float = 1.0, skipped: bool = False) -> None:
        """One step on scaled gradients; the gradients that AdamW saw stay in ``grad``."""
        for name, gradient in gradients.items():
            self.module[name].grad = scale * gradient
        self.optimizer.grad_scale = torch.tensor(scale)
        self.optimizer.found_inf = torch.tensor(float(skipped))
        self.optimizer.step()

    @property
    def group(self) -> AnchoredGroup:
        assert self.projection is not None
        (group,) = self.projection.groups
        return group

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.module.items()}

    def seen(self) -> dict[str, Tensor]:
        """The gradients that AdamW saw, without their scale."""
        return {name: p.grad.clone() for name, p in self.module.items()}

    def state(self) -> dict[str, Tensor]:
        """Copies of everything that a skipped step has to leave."""
        group = self.group
        tensors = {"values": group.values, "updates": group.updates}
        tensors |= {} if group.row_norms is None else {"rows": group.row_norms}
        for name, p in self.module.items():
            tensors |= {f"{name} {key}": value for key, value in self.optimizer.state[p].items()}
            tensors[name] = p.detach()
        return {name: tensor.clone() for name, tensor in tensors.items()}


def complete(options: dict[str, Any]) -> dict[str, Any]:
    """Options with their defaults, for the oracle."""
    return rules.resolve(ProjectionConfig(**options)).model_dump()


def start(shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def steps_of(weights: dict[str, Tensor], count: int = 8, seed: int = 1) -> list[dict[str, Tensor]]:
    """Gradients that drift, turn back and drift again."""
    generator = torch.Generator().manual_seed(seed)
    drift = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    signs = itertools.cycle([1.0, 1.0, -0.4, 1.0, -0.2])
    return [
        {name: sign * d + 0.3 * torch.randn(d.shape, generator=generator) for name, d in drift.items()}
        for sign in itertools.islice(signs, count)
    ]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same bits, NaNs included."""
    return first.keys() == second.keys() and all(
        torch.equal(t.view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8))
        for name, t in first.items()
    )


def error(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((tensors[name].double() - t).abs().max()) for name, t in expected.items())


Observation = dict[str, Any]


def by_engine(options: dict[str, Any], start: list[Any], gradients: list[Any]) -> list[Observation]:
    """What the engine has after each step of one tensor."""
    run = Run({"w": torch.tensor(start)}, options)
    names = (
        ("omega", "mean", "square") if options["name"] == "digrap" else ("radius",) * (options["name"] == "ftp")
    )
    observed = []
    for gradient in gradients:
        run.step({"w": torch.tensor(gradient)})
        measures = run.group.measures
        seen: Observation = {"W": run.weights()["w"], "G": run.seen()["w"]}
        seen |= {name: float(run.group.value(name)) for name in names}
        seen["gamma"] = seen.get("radius")
        if options["name"] == "digrap":
            seen |= {
                "a": float(run.group.value("previous_product")),
                "b": float(run.group.value("previous_square")),
            }
        if options["name"] == "spd":
            seen |= {"fires": bool(measures["triggered"]), "r": float(measures["decay"]) / options["strength"]}
        observed.append(seen)
    return observed


def by_oracle(options: dict[str, Any], start: list[Any], gradients: list[Any]) -> list[Observation]:
    """The same by the oracle, so that the page's numbers vouch for it too."""
    oracle = Oracle(options["name"], complete(options), {"w": torch.tensor(start)})
    tensor, observed = oracle.tensors["w"], []
    for gradient in gradients:
        oracle.step({"w": torch.tensor(gradient)}, RATE)
        seen: Observation = dict(tensor.numbers) | {"W": tensor.weight, "G": tensor.gradient}
        seen |= {"mean": tensor.hyper.mean, "square": tensor.hyper.square, "fires": seen["a"] > 0}
        observed.append(seen)
    return observed


@pytest.fixture(params=[by_engine, by_oracle])
def trajectory(request: pytest.FixtureRequest) -> Callable[..., list[Observation]]:
    chosen: Callable[..., list[Observation]] = request.param
    return chosen


def near(value: Any, expected: Any) -> bool:
    return bool((torch.as_tensor(value).double() - torch.tensor(expected).double()).abs().max() < 1e-6)


# The reference trajectories of each rule


@pytest.mark.parametrize("cosine", ["tensor", "row"])
def test_digrap_reproduces_its_reference_trajectory(trajectory: Any, cosine: str) -> None:
    observed = trajectory({"name": "digrap", "mu": 0.5, "cosine": cosine}, [[1.0, -1.0]], [[g] for g in A])
    rows: list[tuple[float, float, float, list[float], list[float]]] = [
        (0.0, 0.0, 0.0, [1, 2], [0.9000000010, -1.0999999995]),
        (-0.2999999975, 0.0199999997, 0.0, [2, 1], [0.8034817990, -1.1932179628]),
        (0.5829541266, 0.0759525845, 0.3194067939, [-1, -2], [0.7614728690, -1.2042962699]),
        (-0.6813505319, 0.0986321581, 0.7099061785, [0.8302560597, -0.0018748083], [0.7102146281, -1.2133345900]),
        (-0.6560215257, 0.1294872091, 0.9204279169, [1.6486823133, -1.9948148961], [0.6443451560, -1.1894577812]),
    ]
    for number, (seen, (a, b, omega, gradient, weights)) in enumerate(zip(observed, rows, strict=True), 1):
        for name, expected in {"a": a, "b": b, "omega": omega, "G": [gradient], "W": [weights]}.items():
            assert near(seen[name], expected), (number, name, seen[name])
    assert near(observed[-1]["mean"], -0.1109809548)
    assert near(observed[-1]["square"], 0.0020673567)


def test_spd_reproduces_its_reference_trajectory(trajectory: Any) -> None:
    observed = trajectory({"name": "spd", "strength": 0.5}, [[1.0, -1.0]], [[g] for g in SPD_GRADIENTS])
    assert near(observed[1]["W"], [[0.8034817990, -1.1932179628]])
    assert [seen["fires"] for seen in observed] == [False, False, True, False]
    assert near(observed[2]["r"], 0.2404141402)
    assert near(observed[2]["W"], [[0.7753194724, -1.2267441892]])
    assert near(observed[3]["W"], [[0.7078711350, -1.2986480078]])


def test_spd_with_a_large_strength_passes_the_anchor(trajectory: Any) -> None:
    observed = trajectory({"name": "spd", "strength": 5.0}, [[1.0, -1.0]], [[g] for g in SPD_GRADIENTS[:3]])
    assert near(observed[-1]["W"], [[1.0516045881, -0.9479214305]])


@pytest.mark.parametrize("shape", [(1, 2), (2,)])
def test_ftp_reproduces_its_reference_trajectory(trajectory: Any, shape: tuple[int, ...]) -> None:
    gradients = [torch.tensor(g).view(shape).tolist() for g in A]
    begin = torch.tensor([1.0, -1.0]).view(shape).tolist()
    observed = trajectory({"name": "ftp", "k": 1.0}, begin, gradients)
    rows = [
        (1e-8, [0.9999999950, -1.0000000050]),
        (0.0074413782, [0.9962145941, -1.0036559719]),
        (0.0070145159, [0.9946930052, -1.0017075199]),
        (0.0104599626, [0.9926220196, -1.0030819811]),
        (0.0159016120, [0.9855424853, -1.0014440956]),
    ]
    for number, (seen, (gamma, weights)) in enumerate(zip(observed, rows, strict=True), 1):
        assert near(seen["gamma"], gamma), number
        assert near(seen["W"].view(-1), weights), number
    never = trajectory({"name": "ftp", "k": 0.0}, begin, gradients[:3])[-1]
    assert near(never["gamma"], 0.0131935773)
    assert near(never["W"].view(-1), [0.9900180929, -1.0032116680])


def test_ftp_cuts_rows_of_a_matrix_by_one_radius(trajectory: Any) -> None:
    gradients = [[[1.0, 2.0], [0.1, -0.1]], [[2.0, 1.0], [-0.2, 0.1]], [[-1.0, -2.0], [0.1, 0.3]]]
    seen = trajectory({"name": "ftp", "k": 1.0}, [[1.0, -1.0], [0.0, 2.0]], gradients)[-1]
    assert near(seen["gamma"], 0.0064245721)
    assert near(seen["W"], [[0.9951393409, -1.0015639119], [0.0006014893, 1.9941769182]])


def test_l2sp_reproduces_both_forms(trajectory: Any) -> None:
    for form, weights in {
        "coupled": [0.8032147487, -1.1924600084],
        "decoupled": [0.8084817990, -1.1882179628],
    }.items():
        options = {"name": "l2sp", "strength": 0.5, "form": form}
        assert near(trajectory(options, [[1.0, -1.0]], [[g] for g in A[:2]])[-1]["W"], [weights]), form


def test_row_cosines_differ_in_sign_from_that_of_the_tensor() -> None:
    for cosine, expected in {"tensor": 0.1154700538, "row": -0.1309858295}.items():
        run = Run({"w": torch.zeros(2, 2)}, {"name": "digrap", "cosine": cosine})
        run.step({"w": torch.zeros(2, 2)})
        set_previous(run, torch.tensor([[0.1, 0.0], [0.0, 0.2]]), product=-1.0)
        run.step({"w": torch.tensor([[1.0, 2.0], [3.0, -1.0]])})
        # A tenth of h is the first moment of omega's Adam.
        assert float(run.group.value("mean")) == pytest.approx(0.1 * expected), cosine


def set_previous(run: Run, deviation: Tensor, product: float) -> None:
    """Sets what DiGraP kept of the previous update."""
    run.optimizer.state[run.module["w"]][PREVIOUS].copy_(deviation)
    run.group.value("previous_product").fill_(product)
    run.group.value("previous_square").fill_(float(deviation.square().sum()))


@pytest.mark.parametrize(("omega", "expected"), [(0.5, [1.25, 0.25]), (1.0, [0.5, -0.5])])
def test_digrap_removes_the_share_omega(omega: float, expected: list[float]) -> None:
    run = Run({"w": torch.zeros(2)}, {"name": "digrap", "mu": 0.0})
    run.step({"w": torch.zeros(2)})
    run.group.value("omega").fill_(omega)
    with torch.no_grad():
        run.module["w"].fill_(-0.1)
    run.step({"w": torch.tensor([2.0, 1.0])})
    assert near(run.seen()["w"], expected)


# Any shape, against the oracle


@pytest.mark.parametrize("rule", RULES)
def test_rule_equals_the_oracle_at_every_shape(rule: str) -> None:
    options = RULES[rule]
    weights = start()
    run, plain = Run(weights, options), Run(weights, None)
    oracle = Oracle(options["name"], complete(options), weights)
    for gradients in steps_of(weights):
        run.step(gradients)
        plain.step(gradients)
        oracle.step(gradients, RATE)
        assert error(run.weights(), oracle.weights()) < 3e-6
    assert error(plain.weights(), oracle.weights()) > 1e-3
    kept = {"digrap": ("omega", "omega"), "ftp": ("radius", "gamma")}.get(options["name"])
    if kept is not None:
        numbers = dict(zip(run.group.shapes, run.group.value(kept[0]).tolist(), strict=True))
        assert numbers == pytest.approx(oracle.numbers(kept[1]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["ftp", "digrap"])
def test_half_of_an_option_is_no_integer(name: str) -> None:
    key = {"ftp": "k", "digrap": "mu"}[name]
    weights, ends = start(), []
    for value in (0.0, 0.5, 1.0):
        run = Run(weights, {"name": name, key: value})
        for gradients in steps_of(weights):
            run.step(gradients)
        ends.append(run.weights())
    assert error(ends[1], ends[0]) > 1e-4
    assert error(ends[1], ends[2]) > 1e-4


# Zeros


@pytest.mark.parametrize("rule", RULES)
def test_first_update_has_no_nans_and_is_that_of_adamw(rule: str) -> None:
    weights = start()
    run, plain = Run(weights, RULES[rule]), Run(weights, None)
    for each in (run, plain):
        each.step(steps_of(weights)[0])
    assert all(tensor.isfinite().all() for tensor in run.state().values())
    if RULES[rule]["name"] == "ftp":
        # Its first radius is 1e-8: it undoes the update.
        assert error(run.weights(), weights) < 2e-7
        return
    assert same(run.weights(), plain.weights())


@pytest.mark.parametrize("rule", RULES)
def test_weights_that_never_move_have_no_nans(rule: str) -> None:
    weights = start()
    run = Run(weights, RULES[rule])
    for _ in range(3):
        run.step({name: torch.zeros_like(w) for name, w in weights.items()})
    assert same(run.weights(), weights)
    assert all(tensor.isfinite().all() for tensor in run.state().values())
    assert run.projection is not None
    assert all(value.isfinite() for value in run.projection.metrics().values())


@pytest.mark.parametrize("rule", RULES)
def test_tensor_without_gradient_stays_and_the_others_do_not_notice(rule: str) -> None:
    weights = start()
    run, alone = Run(weights, RULES[rule]), Run({n: w for n, w in weights.items() if n != "one"}, RULES[rule])
    for gradients in steps_of(weights, 4):
        rest = {name: g for name, g in gradients.items() if name != "one"}
        run.step(rest)
        alone.step(rest)
    ends = run.weights()
    assert torch.equal(ends.pop("one"), weights["one"])
    assert same(ends, alone.weights())


@pytest.mark.parametrize("rule", INERT)
def test_rule_without_strength_is_bit_equal_to_adamw(rule: str) -> None:
    weights = start()
    run, plain = Run(weights, INERT[rule], weight_decay=0.1), Run(weights, None, weight_decay=0.1)
    for gradients in steps_of(weights):
        run.step(gradients, scale=3.0)
        plain.step(gradients, scale=3.0)
        assert same(run.weights(), plain.weights())
        if RULES[rule]["name"] == "digrap":
            assert not run.group.value("omega").any()


# Scales of the gradients, clipping and skipped steps


@pytest.mark.parametrize("rule", RULES)
def test_loss_scale_changes_nothing(rule: str) -> None:
    weights, ends = start(), []
    for scales in ([1.0], [2.0**16], [2.0**16, 2.0**3, 2.0**10]):
        run = Run(weights, RULES[rule])
        for gradients, scale in zip(steps_of(weights), itertools.cycle(scales)):
            run.step(gradients, scale)
        kept = [name for name in ("omega", "radius") if name in run.group._names]
        ends.append((torch.stack([run.group.value(name) for name in kept]) if kept else None, run.weights()))
    for numbers, tensors in ends[1:]:
        assert error(tensors, ends[0][1]) < 3e-7
        if numbers is not None:
            assert ends[0][0] is not None
            assert torch.allclose(numbers, ends[0][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_clipped_gradients_are_those_of_the_rule(rule: str) -> None:
    """The loss's gradient is clipped, the penalty of L2-SP is not."""
    options, weights = RULES[rule], start()
    run, oracle = Run(weights, options), Oracle(options["name"], complete(options), weights)
    for number, gradients in enumerate(steps_of(weights)):
        divisor = 1.0 + 0.7 * (number % 3)
        for name, gradient in gradients.items():
            run.module[name].grad = 2.0**10 * gradient
        run.optimizer.grad_scale, run.optimizer.found_inf = torch.tensor(2.0**10 * divisor), torch.zeros(())
        run.optimizer.step()
        oracle.step({name: gradient / divisor for name, gradient in gradients.items()}, RATE)
        assert error(run.weights(), oracle.weights()) < 3e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", RULES)
def test_skipped_steps_leave_no_trace(rule: str, value: float) -> None:
    weights = start()
    run, other = Run(weights, RULES[rule]), Run(weights, RULES[rule])
    for number, gradients in enumerate(steps_of(weights, 5)):
        # At t = 1 too: no deviation is defined by a step that was skipped.
        if number in (0, 3):
            before = run.state() if number else run.weights()
            broken = {name: gradient.clone() for name, gradient in gradients.items()}
            broken["matrix"][1, 2] = value
            run.step(broken, skipped=True)
            assert same(before, run.state() if number else run.weights())
            measures = run.group.measures
            assert not any(measures[name].any() for name in ("applied", "decay", "cut") if name in measures)
        run.step(gradients)
        other.step(gradients)
    assert same(run.state(), other.state())


# Properties


def test_full_projection_is_orthogonal_and_never_longer() -> None:
    weights = start({name: shape for name, shape in SHAPES.items() if name != "one"})
    run = Run(weights, {"name": "digrap", "mu": 0.0}, lr=1e-2)
    away = 0
    for number, gradients in enumerate(steps_of(weights, 12)):
        run.group.value("omega").fill_(1.0)
        deviations = {name: (w - weights[name]).double() for name, w in run.weights().items()}
        run.step(gradients)
        for name, seen in run.seen().items():
            product = float((gradients[name].double() * deviations[name]).sum())
            left = float((seen.double() * deviations[name]).sum())
            assert seen.norm() <= gradients[name].norm() * (1 + 1e-6)
            if number > 0 and product < 0:
                away += 1
                assert abs(left) < 1e-5 * abs(product)
            else:
                assert torch.equal(seen, gradients[name])
    assert away > 6


def count_decays(betas: tuple[float, float]) -> int:
    """Times that SPD shrinks a tensor on small steps along the gradient."""
    # A large epsilon makes AdamW's step proportional to its first moment; zeros have fine neighbours.
    weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    run = Run(weights, {"name": "spd", "strength": 1.0}, betas=betas, eps=1e4, lr=1.0)
    generator, decays = torch.Generator().manual_seed(2), 0
    with torch.no_grad():
        for p in run.module.values():
            p.copy_(torch.randn(p.shape, generator=generator))
    for gradients in steps_of(weights, 40):
        run.step(gradients)
        decays += int((run.group.measures["decay"] > 0).sum())
    return decays


def test_spd_acts_by_momentum_only() -> None:
    assert count_decays((0.0, 0.999)) == 0
    assert count_decays((0.9, 0.999)) > 5


# Groups


def test_group_without_a_piece_sums_on_its_device() -> None:
    """A rank may hold no piece of a group, whose sums it still joins: on its own device, not on the CPU."""
    device, reduced = torch.device("meta"), []
    flat = FlatGroup(0, {"w": torch.Size([3, 4])}, [], device, reduced.append, lambda _: [])
    flat.skipped = torch.zeros((), device=device)
    group = AnchoredGroup(flat, lambda _: True, Layout(), "torch")
    group.sums("dd", "gd")
    group.add_to_weights(torch.zeros(1, device=device), with_squares=True)
    assert [tensor.device.type for tensor in reduced] == ["meta", "meta"]


def test_rule_without_any_tensor_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^projection.name = spd: no tuned parameter takes part \(logit_scale\)"
    ):
        Run({"logit_scale": torch.ones(())}, RULES["spd"])
