"""Every formula of the method in plain PyTorch, the reference against which faster paths are tested.

Over ranks each function gathers the unit features of all ranks and evaluates the global formula on every rank.
All ranks then have the same value bit for bit. The backward of the gather returns the gradient of this rank's rows
times the number of ranks, so that *averaging* parameter gradients over ranks, as DeepSpeed does, gives the
gradient of the global loss.

Equation numbers are those of DiVE, arXiv 2511.09973.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dive_fast.kernels.checks import (
    Activation,
    check_activation,
    check_average_vector,
    check_layer_norm,
    check_packed,
    check_pairs,
    check_pixels,
    check_same_kind,
    check_scale,
    check_triple,
)
from dive_fast.kernels.precision import product

VOLUME_EPS = 1e-6
"""The volume of three vectors in a plane, where the root of 0 would have no gradient."""


class DifferenceLoss(NamedTuple):
    """Result of :func:`difference_loss`; only ``loss``, ``()``, carries gradient."""

    loss: Tensor
    average_vector: Tensor
    average_loss: Tensor
    pairwise_loss: Tensor
    image_norm: Tensor
    text_norm: Tensor


class DiveLoss(NamedTuple):
    """Result of :func:`dive_loss`; only ``loss``, ``()``, carries gradient."""

    loss: Tensor
    contrastive_loss: Tensor
    average_vector: Tensor
    average_loss: Tensor
    pairwise_loss: Tensor
    image_norm: Tensor
    text_norm: Tensor


class DistillationLoss(NamedTuple):
    """Result of :func:`distillation_loss`; only ``loss``, ``()``, carries gradient. Terms of weight 0 are 0."""

    loss: Tensor
    feature_loss: Tensor
    relational_loss: Tensor
    interactive_loss: Tensor
    cross_loss: Tensor
    teacher_entropy: Tensor


def unit(features: Tensor) -> Tensor:
    """Rows normalized to unit length in fp32 (fp64 for fp64 features): ``x / max(|x|, 1e-12)``.

    Half precision cannot represent the result: a difference vector of 1e-3 is below its resolution at 1.
    """
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Symmetric contrastive loss, Eq. 1: the mean over pairs of image-to-text and text-to-image cross-entropy.

    Args:
        image_features, text_features: ``(B, D)``, un-normalized; row i of each belongs to the same pair.
        logit_scale: ``()`` or ``(1,)``, the scale ``1 / tau`` itself, not its logarithm.
        group: ranks whose pairs form one batch (equal ``B`` on each); None: this rank alone.

    Returns:
        The loss of the global batch, ``()``.

    Raises:
        ValueError: features are not two non-empty matrices of one shape and dtype, or the scale is not one number.
    """
    check_pairs(image_features=image_features, text_features=text_features)
    check_scale(logit_scale, image_features)
    image = gather_rows(unit(image_features), group)
    text = gather_rows(unit(text_features), group)
    # Under a caller's autocast or with TF32 allowed, ``@`` would lose digits although all dtypes are fp32.
    logits = logit_scale.to(image.dtype) * product(image, text)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def difference_loss(
    image_features: Tensor,
    text_features: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average_vector: Tensor,
    *,
    decay: float = 0.99,
    average_weight: float = 1.0,
    pairwise_weight: float = 1.0,
    mean_gradient: bool = True,
    group: dist.ProcessGroup | None = None,
) -> DifferenceLoss:
    """Average and pairwise vector loss, Eq. 4-8, of the difference vectors u (images) and v (texts).

    ::

        u = unit(image_features) - image_teacher        v = unit(text_features) - text_teacher
        m = decay * average_vector + (1 - decay) * mean_j (u_j + v_j) / 2
        loss = average_weight * mean_j(|u_j - m|^2 + |v_j - m|^2) + pairwise_weight * mean_j |u_j - v_j|^2

    Args:
        image_features, text_features: ``(B, D)``, un-normalized features of the model being tuned.
        image_teacher, text_teacher: ``(B, D)``, unit rows of the frozen model for the same pairs.
        average_vector: ``(D,)``, m of the previous step; zeros before the first.
        mean_gradient: whether this batch's share of m carries gradient, as in the literal Eq. 6-7.
        group: ranks whose pairs form one batch (equal ``B`` on each); None: this rank alone.

    Returns:
        Global values: loss, the updated average vector ``(D,)``, both unweighted parts, and mean |u|, |v|.

    Raises:
        ValueError: features or teachers are not non-empty matrices of one shape, or the vector is not ``(D,)``.
    """
    check_pairs(
        image_features=image_features,
        text_features=text_features,
        image_teacher=image_teacher,
        text_teacher=text_teacher,
    )
    check_average_vector(average_vector, image_features)
    image, text = unit(image_features), unit(text_features)
    u = gather_rows(image - image_teacher.to(image.dtype), group)
    v = gather_rows(text - text_teacher.to(text.dtype), group)
    m = decay * average_vector.to(u.dtype) + (1 - decay) * ((u + v) / 2).mean(0)
    if not mean_gradient:
        m = m.detach()
    average_loss = ((u - m).square() + (v - m).square()).sum(1).mean()
    pairwise_loss = (u - v).square().sum(1).mean()
    loss = average_weight * average_loss + pairwise_weight * pairwise_loss
    parts = (m, average_loss, pairwise_loss, u.norm(dim=1).mean(), v.norm(dim=1).mean())
    return DifferenceLoss(loss, *(part.detach() for part in parts))


def dive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    reference_image_features: Tensor,
    reference_text_features: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average_vector: Tensor,
    *,
    weight: float = 1000.0,
    decay: float = 0.99,
    average_weight: float = 1.0,
    pairwise_weight: float = 1.0,
    mean_gradient: bool = True,
    group: dist.ProcessGroup | None = None,
) -> DiveLoss:
    """The objective of DiVE, Eq. 9: ``contrastive_loss(target) + weight * difference_loss(reference)``.

    Arguments, shapes and errors are those of the two functions; ``weight`` is the paper's lambda.
    """
    check_pairs(image_features=image_features, text_features=text_features)
    check_same_kind(image_features, reference_image_features)
    check_pairs(reference_image_features=reference_image_features, reference_text_features=reference_text_features)
    contrastive = contrastive_loss(image_features, text_features, logit_scale, group=group)
    difference = difference_loss(
        reference_image_features,
        reference_text_features,
        image_teacher,
        text_teacher,
        average_vector,
        decay=decay,
        average_weight=average_weight,
        pairwise_weight=pairwise_weight,
        mean_gradient=mean_gradient,
        group=group,
    )
    return DiveLoss(contrastive + weight * difference.loss, contrastive.detach(), *difference[1:])


def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    teacher_scale: Tensor,
    *,
    feature_weight: float = 0.0,
    relational_weight: float = 0.0,
    interactive_weight: float = 0.0,
    cross_weight: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> DistillationLoss:
    """Distillation of features and of contrastive logits from a teacher of the same batch.

    ::

        f, g unit rows of images and texts, f~, g~ the teacher's;  s, s~ the scales
        l = s f g^T,  l~ = s~ f~ g~^T,  a = s f g~^T,  b = s g f~^T          (B, B) each;  p(x) softmax of rows
        feature     = mean over B D of (f - f~)^2  +  the same of g
        relational  = 1/2 [ KL(p(l~) || p(l)) + KL(p(l~^T) || p(l^T)) ]      KL: sum over a row, mean over rows
        interactive = 1/2 [ CE(a, diagonal) + CE(b, diagonal) ]
        cross       = 1/2 [ KL(p(l~) || p(a)) + KL(p(l~^T) || p(b)) ]
        entropy     = 1/2 [ H(p(l~)) + H(p(l~^T)) ]                          mean over rows, without gradient

    These are FD, CRD, ICL and CKD of TRACER (arXiv 2605.29380), as its code has them. The cross-entropies of
    CaRot (arXiv 2311.01723), sum over both directions, are ``2 (relational + entropy)``.

    Args:
        image_features, text_features: ``(B, D)``, un-normalized features of the model being tuned.
        logit_scale: ``()`` or ``(1,)``, the scale ``1 / tau`` itself, with gradient.
        image_teacher, text_teacher: ``(B, D)``, unit rows of the teacher for the same pairs.
        teacher_scale: ``()`` or ``(1,)``, the teacher's scale.
        group: ranks whose pairs form one batch (equal ``B`` on each); None: this rank alone.

    Returns:
        Global values: the weighted sum, the unweighted terms, and the teacher's entropy, which is computed with
        the relational term. A term of weight 0 is not computed.

    Raises:
        ValueError: features or teachers are not non-empty matrices of one shape, or a scale is not one number.
    """
    check_pairs(
        image_features=image_features,
        text_features=text_features,
        image_teacher=image_teacher,
        text_teacher=text_teacher,
    )
    check_scale(logit_scale, image_features)
    check_scale(teacher_scale, image_features, "teacher_scale")
    f, g = (gather_rows(unit(rows), group) for rows in (image_features, text_features))
    ft, gt = (gather_rows(rows.to(f.dtype).detach(), group) for rows in (image_teacher, text_teacher))
    s, st = logit_scale.to(f.dtype).reshape(()), teacher_scale.to(f.dtype).detach().reshape(())
    zero = f.new_zeros(())
    feature = relational = interactive = cross = entropy = zero
    if feature_weight:
        feature = (f - ft).square().mean() + (g - gt).square().mean()
    if relational_weight or cross_weight:
        teacher_logits = st * product(ft, gt)
        rows, columns = (F.log_softmax(logits, 1) for logits in (teacher_logits, teacher_logits.T))
    if relational_weight:
        logits = s * product(f, g)
        relational = (
            kl_divergence(rows, F.log_softmax(logits, 1)) + kl_divergence(columns, F.log_softmax(logits.T, 1))
        ) / 2
        entropy = -((rows.exp() * rows).sum() + (columns.exp() * columns).sum()) / (2 * len(rows))
    if interactive_weight or cross_weight:
        a, b = s * product(f, gt), s * product(g, ft)
    if interactive_weight:
        labels = torch.arange(len(f), device=f.device)
        interactive = (F.cross_entropy(a, labels) + F.cross_entropy(b, labels)) / 2
    if cross_weight:
        cross = (kl_divergence(rows, F.log_softmax(a, 1)) + kl_divergence(columns, F.log_softmax(b, 1))) / 2
    loss = (
        feature_weight * feature
        + relational_weight * relational
        + interactive_weight * interactive
        + cross_weight * cross
    )
    return DistillationLoss(loss, *(term.detach() for term in (feature, relational, interactive, cross, entropy)))


def gram_volume(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Volume that three unit vectors span, Eq. 8-9 of GRACE (arXiv 2603.27139), mean over rows.

    ::

        volume = mean over rows of sqrt(max(det G, 0) + e^2),   G_jk = z_j . z_k,   e = 1e-6;   z_j unit rows

    It is 1 for orthogonal vectors, and e for vectors in a plane. The determinant is computed from differences,
    since the one of G is below its rounding error where vectors are close::

        a = z_2 - z_1,   b = z_3 - z_1,   p = z_1 . a,   q = z_1 . b
        det G = |z_1|^2 (|a|^2 |b|^2 - (a . b)^2) - p^2 |b|^2 - q^2 |a|^2 + 2 p q (a . b)

    ``|z_1|`` is 1, except for rows below the clamp of :func:`unit`.

    Args:
        first, second, third: ``(B, D)``, un-normalized features, with gradient; 0 where ``det G <= 0``.

    Returns:
        The mean of the volumes, ``()``, fp32 (fp64 for fp64 features).

    Raises:
        ValueError: features are not non-empty matrices of one shape, dtype and device.
    """
    check_triple(first, second, third)
    z = unit(first)
    a, b = unit(second) - z, unit(third) - z
    pairs = (z, z), (a, a), (b, b), (a, b), (z, a), (z, b)
    zz, aa, bb, ab, p, q = ((left * right).sum(1) for left, right in pairs)
    determinant = zz * (aa * bb - ab * ab) - p * p * bb - q * q * aa + 2 * (p * q * ab)
    # The gradient of relu at 0 is 0; that of clamp is 1.
    return (determinant.relu() + VOLUME_EPS**2).sqrt().mean()


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over rows of KL(teacher || student), from logarithms of probabilities."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks in rank order, ``(B, D) -> (W B, D)``.

    The backward gives W times the gradient of this rank's rows, which is right if every rank computes the same
    function of the result (see the module's docstring).
    """
    if group is None or dist.get_world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows, group)  # type: ignore[no-any-return, no-untyped-call]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.world_size = dist.get_world_size(group)
        ctx.first = dist.get_rank(group) * len(rows)
        ctx.count = len(rows)
        gathered = rows.new_empty(ctx.world_size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.world_size * gradient[ctx.first : ctx.first + ctx.count], None


def biased_activation(x: Tensor, bias: Tensor | None, kind: Activation) -> Tensor:
    """``act(x + bias)``, computed in fp32 (fp64 for fp64 inputs) and rounded once to the dtype of ``x``.

    ::

        quick_gelu(z) = z sigmoid(1.702 z)
        gelu(z)       = z (1 + erf(z / sqrt 2)) / 2
        gelu_tanh(z)  = z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2

    Args:
        x: ``(..., W)``.
        bias: ``(W,)``, or None.
    """
    check_activation(x, bias, kind)
    with _without_autocast(x):
        z = _at_least_fp32(x)
        if bias is not None:
            z = z + bias.to(z.dtype)
        if kind == "quick_gelu":
            y = z * torch.sigmoid(1.702 * z)
        else:
            y = F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")
        return y.to(x.dtype)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Residual addition and layer norm, in fp32 (fp64 for fp64 inputs).

    ::

        sum = x + branch + branch_bias                                  rounded once to the dtype of x
        normed = (sum - mean) / sqrt(mean((sum - mean)^2) + eps) * weight + bias      rounded to ``dtype``

    Args:
        x: ``(..., D)``.
        branch: like ``x``, or None, for which the sum is ``x`` itself; its dtype may differ.
        branch_bias: ``(D,)``, or None.
        weight, bias: ``(D,)``.

    Returns:
        ``sum`` and ``normed``.
    """
    check_layer_norm(x, branch, branch_bias, weight, bias, dtype)
    with _without_autocast(x):
        total = x
        if branch is not None:
            total = _at_least_fp32(x) + branch
            if branch_bias is not None:
                total = total + branch_bias
            total = total.to(x.dtype)
        rows = _at_least_fp32(total)
        normed = F.layer_norm(rows, weight.shape, weight.to(rows.dtype), bias.to(rows.dtype), eps)
        return total, normed.to(dtype)


def split_qkv(qkv: Tensor, bias: Tensor | None, heads: int, *, parts: int = 3) -> tuple[Tensor, ...]:
    """Views of queries, keys and values, ``(B, N, 3 H d) -> (B, H, N, d)`` each.

    Args:
        qkv: the packed product, to which the bias has been added already.
        bias: ``(3 H d,)``, receives the column sums of the gradient of ``qkv``; None: no sums.
        heads: H.
        parts: 2 for keys and values alone, ``(B, N, 2 H d)``.
    """
    check_packed(qkv, bias, heads, parts)
    if bias is not None:
        qkv = _AddedBias.apply(qkv, bias)  # type: ignore[no-untyped-call]
    return qkv.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def move_averages(averages: Sequence[Tensor], values: Sequence[Tensor], rate: Tensor) -> None:
    """``psi <- psi + w (theta - psi)`` of each pair, in place; w = 0 changes no bit, whatever theta is.

    Args:
        averages, values: psi and theta, of equal shapes.
        rate: w, ``()`` or ``(1,)``, on their device.
    """
    rate = rate.reshape(())
    for average, value in zip(averages, values, strict=True):
        average.copy_(torch.where(rate == 0, average, average + rate * (value - average)))


def normalise_images(
    pixels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """``(x / 255 - mean_c) / std_c`` of 8-bit images, computed in fp32 and rounded once to ``dtype``.

    The order of operations is that of torchvision's ``to_tensor`` and ``normalize``.

    Args:
        pixels: ``(B, H, W, 3)`` uint8.
        mean, std: one number for each channel.
        channels_last: memory format of the result.

    Returns:
        ``(B, 3, H, W)``.
    """
    check_pixels(pixels, mean, std, dtype)
    # Tensors on the device: CUDA multiplies by the reciprocal of a number.
    white, means, stds = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
        for values in ([255.0], list(mean), list(std))
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
    return images.div_(white).sub_(means).div_(stds).to(dtype, memory_format=layout)


class _AddedBias(torch.autograd.Function):
    # The identity with the gradient of ``rows + bias``, for a bias that was added without a gradient.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = bias.dtype
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if not ctx.needs_input_grad[1]:
            return gradient, None
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        return gradient, gradient.flatten(0, -2).sum(0, dtype=dtype).to(ctx.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would compute a layer norm of 16 bits in other dtypes on CPU and CUDA."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
