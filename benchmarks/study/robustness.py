"""Robustness of a model: accuracy under attack, shift of its image features, and sharpness of its loss.

Sharpness is the largest eigenvalue of the Hessian H of one loss for all methods: the mean cross-entropy of
:data:`BATCH` training pictures, in the evaluation view, by the model's classifier, which is a constant. The
parameters are all those of the image tower, with adapters merged. The Lanczos method is power iteration that keeps
its iterates, and takes the largest eigenvalue in the space that they span. Products with H are in fp32.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dive_fast.data.loaders.loader import Options as LoaderOptions
from dive_fast.data.loaders.loader import batches_of
from dive_fast.distributed import Ranks
from dive_fast.evaluation.attacks.attack_options import AttackOptions
from dive_fast.evaluation.attacks.robust_accuracy import robust_accuracy
from dive_fast.evaluation.classifier import Classifier
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.strict_samples import StrictSamples
from dive_fast.model.towers import Towers, unit
from study.methods import ATTACK_EPS

ATTACK = AttackOptions("apgd-ce", (ATTACK_EPS,), samples=500)
"""As large as the attack that methods train on."""
AT_ONCE = 125
"""Images that are attacked at once."""
BATCH = 128
"""Training pictures of the loss whose sharpness is measured."""
PRODUCTS, TOLERANCE = 60, 1e-2
"""Products with the Hessian at most, and the relative length of ``H x - value x`` that ends them before. The error
of the value is of second order in it."""


class Eigenvalue(NamedTuple):
    """The largest eigenvalue of a symmetric matrix."""

    value: float
    error: float
    """Length of ``H x - value x`` at the unit vector x: an eigenvalue is this near."""
    products: int


def is_measured(row: dict[str, Any]) -> bool:
    """Whether a line of the results has the present attacks."""
    return row.get("attacked") is not None and row["attacked"]["eps"] == list(ATTACK.eps)


def under_attack(towers: Towers, classes: Classifier, data: Labelled, ranks: Ranks) -> dict[str, Any]:
    """Accuracy of a fixed subset of a set: clean, and under :data:`ATTACK`, at each of its sizes."""
    loader = LoaderOptions(device=ranks.device)
    measured = [
        robust_accuracy(towers, classes, data, ranks, ATTACK, eps, batch_size=AT_ONCE, loader=loader)
        for eps in ATTACK.eps
    ]
    return {
        "eps": list(ATTACK.eps),
        "accuracy": [each.robust for each in measured],
        "clean": measured[0].clean,
        "samples": measured[0].samples,
        "not_finite": sum(each.not_finite for each in measured),
    }


def feature_shift(before: Tensor, after: Tensor) -> float:
    """Mean of ``1 - cosine`` between the features of the same images before and after tuning.

    Args:
        before, after: ``(N, D)`` unit rows.
    """
    return float((1 - (before.double() * after.double()).sum(1)).mean())


def sharpness(towers: Towers, classes: Classifier, data: Labelled) -> Eigenvalue:
    """The largest eigenvalue of the Hessian of the clean cross-entropy by the image tower's weights.

    Args:
        data: the training set; its first pictures in a fixed random order are the batch.
    """
    towers = copy.deepcopy(towers).cpu().eval().requires_grad_(False)
    images, labels = _batch(towers, data)
    weight, bias = classes.weight.detach().cpu(), classes.bias
    classes = classes._replace(weight=weight, bias=None if bias is None else bias.detach().cpu())
    parameters = [parameter.requires_grad_() for parameter in towers.visual.parameters()]
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        logits = classes.logits(unit(towers.encode_image(images))) * classes.scale
        product = hessian_product(F.cross_entropy(logits, labels), parameters)
        count = sum(parameter.numel() for parameter in parameters)
        start = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return largest_eigenvalue(product, start)


def _batch(towers: Towers, data: Labelled) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(data.source), generator=torch.Generator().manual_seed(0)).tolist()
    samples = StrictSamples(data.source, towers.preprocess)
    with closing(batches_of(samples, [(0, row) for row in order[:BATCH]], BATCH, LoaderOptions())) as batches:
        batch = next(batches)
    return batch.images, batch.labels


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function ``x -> H x`` of the Hessian of a loss by its parameters; ``(n,)`` all of them, flat.

    Args:
        loss: ``()``, with its graph.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    sizes = [parameter.numel() for parameter in parameters]

    def product(vector: Tensor) -> Tensor:
        parts = zip(gradients, vector.to(gradients[0]).split(sizes), strict=True)
        along = torch.stack([gradient.flatten() @ part for gradient, part in parts]).sum()
        rows = torch.autograd.grad(along, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([row.flatten() for row in rows])

    return product


@torch.no_grad()
def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, products: int = PRODUCTS, tolerance: float = TOLERANCE
) -> Eigenvalue:
    """The largest eigenvalue of a symmetric matrix, by the Lanczos method with full orthogonalisation.

    Args:
        product: ``x -> H x``, in any precision.
        start: ``(n,)``, with a part along the eigenvector.
        products: at most.
        tolerance: of the error, relative to the eigenvalue.
    """
    basis, diagonal, beside = [start / start.norm()], list[float](), list[float]()
    while True:
        with torch.enable_grad():
            image = product(basis[-1]).double()
        diagonal.append(float(image @ basis[-1]))
        rows = torch.stack(basis)
        # Twice, since rounding leaves a part after the first time.
        for _ in range(2):
            image = image - rows.T @ (rows @ image)
        length = float(image.norm())
        off = torch.tensor(beside, dtype=torch.float64)
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        largest = Eigenvalue(float(values[-1]), length * abs(float(vectors[-1, -1])), len(basis))
        if largest.error <= tolerance * abs(largest.value) or len(basis) in (products, len(start)):
            return largest
        basis.append(image / length)
        beside.append(length)
