"""Verifies loss, average vector and all gradients against float64, at any batch size, before a case is measured.

The error of a tensor is its largest absolute error relative to the largest entry of the float64 result.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from losses import (
    DECAY,
    DIFFERENCE_NORM,
    LEAVES,
    LOGIT_SCALE,
    WEIGHT,
    Case,
    Inputs,
    loss_scale,
    make_inputs,
)
from torch import Tensor

from dive_fast.kernels import naive

WITHOUT_SCALE = ("memeff",)
"""Competitors whose logit scale is a number."""
OURS = ("naive", "triton", "triton_apart", "triton_fused", "triton_chunked")


def evaluate(inputs: Inputs, operation: str, scale: Tensor, rows: int = 8192) -> dict[str, Tensor]:
    """Outputs of ``losses.step`` by naive's formulas, in naive's precision and in memory linear in B.

    Each cross-entropy is a sum over rows, and is evaluated and differentiated ``rows`` at a time.
    """
    value = torch.zeros((), device=scale.device)
    outputs: dict[str, Tensor] = {}
    if operation != "difference":
        units = [naive.unit(features) for features in inputs[:2]]
        image, text = leaves = [x.detach().requires_grad_() for x in units]
        logit_scale = inputs.logit_scale.detach().to(image.dtype).requires_grad_()
        labels = torch.arange(len(image), device=image.device)
        for chunk in labels.split(rows):
            few = slice(int(chunk[0]), int(chunk[-1]) + 1)
            for queries, keys in ((image, text), (text, image)):
                logits = logit_scale * (queries[few] @ keys.T)
                part = F.cross_entropy(logits, chunk, reduction="sum") / (2 * len(image))
                part.backward(scale.to(part.dtype))
                value = value + part.detach()
        of_features = torch.autograd.grad(units, inputs[:2], [x.grad for x in leaves])
        assert logit_scale.grad is not None
        gradients = *of_features, logit_scale.grad
        outputs |= {f"gradient of {name}": x for name, x in zip(LEAVES["contrastive"], gradients)}
    if operation != "contrastive":
        difference = naive.difference_loss(*inputs[3:])
        part = difference.loss * (WEIGHT if operation == "joint" else 1)
        of_features = torch.autograd.grad(part, inputs[3:5], scale.to(part.dtype))
        outputs |= {f"gradient of {name}": x for name, x in zip(LEAVES["difference"], of_features)}
        value, outputs["average_vector"] = value + part.detach(), difference.average_vector
    return outputs | {"loss": value}


def in_float64(inputs: Inputs) -> Inputs:
    """The same rounded inputs in float64."""
    return Inputs(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))


def relative_errors(outputs: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each tensor; both arguments must have the same tensors."""
    assert outputs.keys() == truth.keys(), sorted(outputs.keys() ^ truth.keys())
    return {name: ((outputs[name].double() - x).abs().max() / x.abs().max()).item() for name, x in truth.items()}


@lru_cache(maxsize=1)  # consecutive cases differ only in the competitor
def expected(
    operation: str, batch: int, width: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """float64 outputs for ``make_inputs(batch, width, dtype)``, and naive's errors in this dtype."""
    inputs, scale = make_inputs(batch, width, dtype), loss_scale(batch, dtype)
    truth = evaluate(in_float64(inputs), operation, scale)
    return truth, relative_errors(evaluate(inputs, operation, scale), truth)


def tolerances(outputs: dict[str, Tensor], truth: dict[str, Tensor], case: Case) -> dict[str, float]:
    """Error allowed for each tensor whatever naive's is: one rounding of the result.

    A few numbers are few draws, and naive may be right by luck. They may be off by one rounding of what they are
    computed from, which is larger: logits; the cosines of unit vectors; those vectors' entries; differences.

    Eager and compiled code in half precision also round every logit, which moves a softmax by as much, relative:
    nothing they compute is better than that.
    """
    dtype = outputs[f"gradient of {LEAVES[case.operation][0]}"].dtype
    operands = {
        "loss": 2 * DIFFERENCE_NORM if case.operation == "difference" else LOGIT_SCALE,
        "gradient of logit_scale": 4 * loss_scale(case.batch, dtype).item(),
        "average_vector": 1 - DECAY,
    }
    allowed = {}
    for name, output in outputs.items():
        largest = truth[name].abs().max().item()
        allowed[name] = torch.finfo(output.dtype).eps / 2 * operands.get(name, largest) / largest
        if case.competitor not in OURS:
            allowed[name] = max(allowed[name], LOGIT_SCALE * torch.finfo(dtype).eps / 2)
    return allowed


def check(
    outputs: dict[str, Tensor], truth: dict[str, Tensor], naive_errors: dict[str, float], case: Case
) -> dict[str, float]:
    """The errors of all tensors; each may be twice naive's in this dtype, or within :func:`tolerances`.

    Raises:
        AssertionError: one of them, named, is wrong.
    """
    if case.competitor in WITHOUT_SCALE:
        truth = {name: tensor for name, tensor in truth.items() if name != "gradient of logit_scale"}
    errors, allowed = relative_errors(outputs, truth), tolerances(outputs, truth, case)
    for name, error in errors.items():
        most = max(2 * naive_errors[name], allowed[name])
        # Written so that NaN fails.
        assert error <= most, f"{case.competitor}: {name} off by {error:.1e} of its largest entry, over {most:.1e}"
    return errors
