"""The methods in weight space and AdamW in float64, tensor by tensor and row by row, as the papers write them.

Every tensor is complete and in one process: the oracle knows no shards, scales, skipped steps or kernels.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Adam:
    """Adam's bias-corrected direction, for one tensor or one number."""

    def __init__(self, betas: tuple[float, float], epsilon: float) -> None:
        self.betas, self.epsilon, self.mean, self.square = betas, epsilon, 0.0, 0.0

    def __call__(self, gradient: Any, step: int) -> Any:
        (first, second), g = self.betas, gradient
        self.mean = first * self.mean + (1 - first) * g
        self.square = second * self.square + (1 - second) * g * g
        return (self.mean / (1 - first**step)) / ((self.square / (1 - second**step)) ** 0.5 + self.epsilon)


class TensorOracle:
    """One tensor under AdamW and a rule."""

    def __init__(
        self, name: str, options: dict[str, Any], weight: Tensor, adamw: dict[str, Any], decay: float
    ) -> None:
        self.rule, self.options = name, options
        self.weight, self.anchor = weight.double().clone(), weight.double().clone()
        self.adam, self.decay = Adam(**adamw), decay
        self.hyper = Adam((0.9, 0.999), 1e-8)
        self.steps, self.numbers = 0, {"omega": 0.0, "gamma": 0.0, "r": 0.0}
        self.previous: dict[str, Any] = {}
        self.gradient = torch.zeros(())

    def rows(self, tensor: Tensor) -> Tensor:
        """A matrix with a row for each entry of the first dimension; a vector is one row."""
        return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(len(tensor), -1)

    def step(self, gradient: Tensor, rate: float) -> None:
        self.steps += 1
        gradient = gradient.double().reshape(self.anchor.shape)
        d = self.weight - self.anchor
        a, b = dot(gradient, d), dot(d, d)
        self.numbers |= {"a": a, "b": b}
        if self.rule == "digrap":
            gradient = self.digrap(gradient, d, a, b)
        if self.rule == "l2sp" and self.options["form"] == "coupled":
            gradient = gradient + self.options["strength"] * d
        self.gradient = gradient
        update = rate * (self.adam(gradient, self.steps) + self.decay * self.weight)
        self.weight = self.weight - update
        if self.rule == "l2sp" and self.options["form"] == "decoupled":
            self.weight = self.weight - rate * self.options["strength"] * d
        if self.rule == "spd" and a > 0:
            self.spd(b)
        if self.rule == "ftp":
            self.ftp(gradient)

    def digrap(self, gradient: Tensor, d: Tensor, a: float, b: float) -> Tensor:
        omega = 0.0
        if self.steps > 1:
            last = d if self.options["direction"] == "current" else self.previous["d"]
            pairs = [(gradient, last)]
            if self.options["cosine"] == "row":
                pairs = list(zip(self.rows(gradient), self.rows(last), strict=True))
            h = math.copysign(1.0, self.previous["a"]) * sum(cosine(x, y) for x, y in pairs)
            h = h if self.previous["a"] != 0 else 0.0
            omega = self.numbers["omega"] - self.options["mu"] * self.hyper(h, self.steps)
            omega = min(1.0, max(0.0, omega))
            self.numbers["h"] = h
        self.numbers["omega"] = omega
        self.previous = {"d": d, "a": a}
        return gradient - omega * (a / b) * d if a < 0 else gradient

    def spd(self, b: float) -> None:
        e = self.weight - self.anchor
        before, after = math.sqrt(b), math.sqrt(dot(e, e))
        r = min(1.0, max(0.0, (after - before) / after)) if after > 0 else 0.0
        self.numbers["r"] = r
        self.weight = self.weight - self.options["strength"] * r * e

    def ftp(self, gradient: Tensor) -> None:
        change = self.weight - self.anchor
        norms = self.rows(change).abs().sum(1) + 1e-8
        gamma = 1e-8
        if self.steps > 1:
            products = (self.rows(gradient) * self.rows(self.previous["C"])).sum(1)
            g = float((products / self.previous["N"]).sum())
            self.numbers["g"] = g
            g = self.options["k"] * g if g > 0 else g
            gamma = self.numbers["gamma"] - 1e-2 * self.hyper(g, self.steps)
            gamma = min(float(norms.max()), max(1e-8, gamma))
        self.numbers["gamma"] = gamma
        ratio = (gamma / norms).clamp(0, 1).reshape(-1, 1)
        self.weight = self.anchor + (ratio * self.rows(change)).reshape(self.anchor.shape)
        self.previous = {"C": change, "N": norms}


class Oracle:
    """All tensors of a run; gradients are those of the loss, after clipping."""

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        weights: Mapping[str, Tensor],
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: Mapping[str, float] | None = None,
        left_out: tuple[str, ...] = (),
    ) -> None:
        adamw = {"betas": betas, "epsilon": epsilon}
        self.tensors = {
            key: TensorOracle(
                "none" if key in left_out else name, options, weight, adamw, (weight_decay or {}).get(key, 0.0)
            )
            for key, weight in weights.items()
        }

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        for key, tensor in self.tensors.items():
            tensor.step(gradients[key], rate)

    def weights(self) -> dict[str, Tensor]:
        return {key: tensor.weight for key, tensor in self.tensors.items()}

    def numbers(self, name: str) -> dict[str, float]:
        return {key: tensor.numbers[name] for key, tensor in self.tensors.items() if tensor.rule != "none"}


def dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum())


def cosine(x: Tensor, y: Tensor) -> float:
    lengths = math.sqrt(dot(x, x)) * math.sqrt(dot(y, y))
    return dot(x, y) / lengths if lengths > 0 else 0.0
