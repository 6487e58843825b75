"""Cases of the loss benchmarks: inputs, and every implementation of the losses behind one signature."""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peers import dive_published, flyp
from torch import Tensor

from dive_fast.kernels import contrastive, contrastive_loss, difference_loss, dive_loss, naive

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

SETTINGS = contrastive.SETTINGS

LOGIT_SCALE = 100.0  # the bound that CLIP's pre-training clamps it to
WEIGHT = 1000.0  # lambda of the difference loss
DECAY = 0.99
FEATURE_NORM = 10.0  # about that of CLIP's towers
# Shares common to all rows and to a pair: as in CLIP, cosines are about 0.2, a pair's 0.1 more.
CONE, PAIR = 0.5, 0.15
DIFFERENCE_NORM = 3e-3  # |u| and |v| in fine-tuning: far below what half precision resolves in a unit vector


class Inputs(NamedTuple):
    """Inputs of one step in the order of ``dive_loss``; features and the scale require gradients."""

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    reference_image_features: Tensor
    reference_text_features: Tensor
    image_teacher: Tensor
    text_teacher: Tensor
    average_vector: Tensor


class Case(NamedTuple):
    """One measurement: an operation, forward and backward, on B target and B reference pairs of width D."""

    operation: str
    batch: int
    width: int
    competitor: str

    def __str__(self) -> str:
        return f"{self.operation}-{self.batch}x{self.width}-{self.competitor}"


Loss = Callable[[Inputs, str], tuple[Tensor, Tensor | None]]

_CONTRASTIVE, _DIFFERENCE = Inputs._fields[:3], Inputs._fields[3:5]
LEAVES = {"joint": _CONTRASTIVE + _DIFFERENCE, "contrastive": _CONTRASTIVE, "difference": _DIFFERENCE}


def make_inputs(batch: int, width: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Features in ``dtype`` with CLIP's norms and cosines, a teacher about ``DIFFERENCE_NORM`` away, in fp32."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    noise = torch.randn(6, batch, width, device=DEVICE, generator=generator)
    image, text, reference_image, reference_text, *drifts = noise
    cone = CONE * torch.randn(width, device=DEVICE, generator=generator)
    features = (image + cone, text + PAIR * image + cone, reference_image + cone, reference_text + cone)
    leaves = [(FEATURE_NORM * naive.unit(rows)).to(dtype) for rows in features]
    teachers = [naive.unit(x) + DIFFERENCE_NORM * naive.unit(drift) for x, drift in zip(leaves[2:], drifts)]
    average_vector = DIFFERENCE_NORM / 3 * naive.unit(torch.randn(width, device=DEVICE, generator=generator))
    leaves.insert(2, torch.full((1,), LOGIT_SCALE, device=DEVICE))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return Inputs._make([*leaves, *(naive.unit(teacher) for teacher in teachers), average_vector])


def loss_scale(batch: int, dtype: torch.dtype) -> Tensor:
    """Loss scale: in fp16 close to GradScaler's steady state, since a logit's gradient is about 1 / B."""
    return torch.tensor(128.0 * batch if dtype == torch.float16 else 1.0, device=DEVICE)


def eager_contrastive(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Contrastive loss as in FLYP and open_clip: two matrices of logits, two cross-entropies."""
    # Autocast normalizes in fp32 on CUDA but not on the CPU.
    image_features = F.normalize(image_features.float(), dim=-1)
    text_features = F.normalize(text_features.float(), dim=-1)
    return flyp.contrastive_loss(image_features, text_features, logit_scale)


def eager_difference(
    image_features: Tensor,
    text_features: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average_vector: Tensor,
) -> tuple[Tensor, Tensor]:
    """Average and pairwise vector loss, and the new average vector, by DiVE's Eq. 4-8."""
    image_features = F.normalize(image_features.float(), dim=-1)
    text_features = F.normalize(text_features.float(), dim=-1)
    teachers = image_teacher, text_teacher
    average_loss, pairwise_loss, m = dive_published.difference_losses(
        image_features, text_features, *teachers, average_vector, DECAY
    )
    return average_loss + pairwise_loss, m.detach()


def eager(inputs: Inputs, operation: str) -> tuple[Tensor, Tensor | None]:
    """Eager losses under autocast in the features' dtype, as in open_clip."""
    dtype = inputs.image_features.dtype
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        if operation == "contrastive":
            return eager_contrastive(*inputs[:3]), None
        difference, average_vector = eager_difference(*inputs[3:])
        if operation == "difference":
            return difference, average_vector
        return eager_contrastive(*inputs[:3]) + WEIGHT * difference, average_vector


def ours(inputs: Inputs, operation: str, backend: str) -> tuple[Tensor, Tensor | None]:
    """Losses of ``dive_fast.kernels``."""
    if operation == "contrastive":
        return contrastive_loss(*inputs[:3], backend=backend), None
    if operation == "difference":
        difference = difference_loss(*inputs[3:], decay=DECAY, backend=backend)
        return difference.loss, difference.average_vector
    joint = dive_loss(*inputs, weight=WEIGHT, decay=DECAY, backend=backend)
    return joint.loss, joint.average_vector


def ours_one_way(inputs: Inputs, operation: str, fused: bool) -> tuple[Tensor, Tensor | None]:
    """Triton losses with a fused or a chunked contrastive gradient at every size."""
    contrastive.SETTINGS = SETTINGS._replace(gradient="fused" if fused else "chunked")
    return ours(inputs, operation, "triton")


def ours_by_size(inputs: Inputs, operation: str) -> tuple[Tensor, Tensor | None]:
    """Triton losses with the gradient chosen by size."""
    contrastive.SETTINGS = SETTINGS
    return ours(inputs, operation, "triton")


def ours_apart(inputs: Inputs, operation: str) -> tuple[Tensor, Tensor | None]:
    """Joint objective as the sum of the two Triton losses."""
    target, _ = ours_by_size(inputs, "contrastive")
    reference, average_vector = ours_by_size(inputs, "difference")
    return target + WEIGHT * reference, average_vector


def memeff(inputs: Inputs, operation: str) -> tuple[Tensor, Tensor | None]:
    """Contrastive loss of the package memeff, whose scale is a number and has no gradient."""
    from memeff import MemoryEfficientCLIPLoss

    # stable=True would return another gradient than that of the loss.
    loss = MemoryEfficientCLIPLoss(temperature=1 / LOGIT_SCALE, stable=False)
    return loss(inputs.image_features, inputs.text_features), None


COMPETITORS: dict[str, Loss] = {
    "eager": eager,
    "compiled": torch.compile(eager, dynamic=False),
    "naive": partial(ours, backend="torch"),
    "triton": ours_by_size,
    "triton_apart": ours_apart,
    "triton_fused": partial(ours_one_way, fused=True),
    "triton_chunked": partial(ours_one_way, fused=False),
}
if find_spec("memeff") and DEVICE.type == "cuda":  # it asks CUDA for its tiles
    COMPETITORS["memeff"] = memeff
# Competitors that apply to one operation only.
_OPERATION = {"triton_apart": "joint", "triton_fused": "contrastive", "triton_chunked": "contrastive"}
_OPERATION |= {"memeff": "contrastive"}

# The most informative sizes first and compiled cases last, since time may be limited.
_FIRST = [(512, 512), (32768, 768)]
_SIZES = [*_FIRST, *(set(product((256, 512, 2048, 8192, 32768), (512, 768))) - set(_FIRST))]
_PARTS = (_SIZES[:2], _SIZES[2:]) if DEVICE.type == "cuda" else ([(33, 48)],)
CASES = [
    Case(operation, batch, width, competitor)
    for part, slow in product(_PARTS, (False, True))
    for (batch, width), operation, competitor in product(sorted(part), LEAVES, COMPETITORS)
    if _OPERATION.get(competitor, operation) == operation and (competitor == "compiled") == slow
]


def step(loss: Loss, inputs: Inputs, operation: str, scale: Tensor) -> dict[str, Tensor]:
    """Forward and backward: returns the loss, the average vector if any, and ``scale`` times the gradients.

    Leaves that the loss does not differentiate have no entry.
    """
    value, average_vector = loss(inputs, operation)
    names = LEAVES[operation]
    outputs = {"loss": value.detach()} | ({} if average_vector is None else {"average_vector": average_vector})
    leaves = [getattr(inputs, name) for name in names]
    gradients = torch.autograd.grad(value, leaves, scale, allow_unused=True)
    named = zip(names, gradients)
    return outputs | {f"gradient of {name}": gradient for name, gradient in named if gradient is not None}
