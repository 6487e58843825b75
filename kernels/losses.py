"""The public losses: they validate their arguments, choose the backend and name the results."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from dive_fast.kernels import backend as backends
from dive_fast.kernels import checks, direct, naive, process_group
from dive_fast.kernels.backend import Backend
from dive_fast.kernels.naive import DifferenceLoss, DistillationLoss, DiveLoss

if backends.primitives is not None:
    # The import registers the custom ops, which must happen before anything is traced.
    from dive_fast.kernels import contrastive, difference, distillation, joint_step, volume


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Symmetric contrastive loss, Eq. 1: the mean over pairs of image-to-text and text-to-image cross-entropy.

    ::

        l_ij = logit_scale * unit(image_i) . unit(text_j)
        loss = 1/(2B) sum_i [ log sum_j exp l_ij + log sum_j exp l_ji - 2 l_ii ]

    Extra memory is linear in B with the Triton kernels, and 4 B^2 bytes several times over with plain PyTorch.

    Args:
        image_features, text_features: ``(B, D)``, un-normalized; row i of each belongs to the same pair.
        logit_scale: ``()`` or ``(1,)``, the scale ``1 / tau`` itself, not its logarithm.
        group: ranks whose pairs form one batch (equal ``B`` on each); None: this rank alone.
        backend: "triton", "torch", or "auto": triton where it can run (see :mod:`dive_fast.kernels.backend`).

    Returns:
        The loss of the global batch, ``()``, fp32 (fp64 for fp64 features).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_pairs(image_features=image_features, text_features=text_features)
    checks.check_scale(logit_scale, image_features)
    if not backends.uses_triton(backend, image_features):
        return naive.contrastive_loss(image_features, text_features, logit_scale, group=group)
    tensors = image_features, text_features, logit_scale
    run = contrastive.apply if direct.is_eager(*tensors) else contrastive.forward
    loss, *_ = run(*tensors, process_group.name_of(group))
    return loss


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
    backend: Backend = "auto",
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
        backend: as for :func:`contrastive_loss`; only "torch" gives gradients to teachers and average vector.

    Returns:
        Global values: loss, the updated average vector ``(D,)``, both unweighted parts, and mean |u|, |v|. No
        synchronization with the device.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_pairs(
        image_features=image_features,
        text_features=text_features,
        image_teacher=image_teacher,
        text_teacher=text_teacher,
    )
    checks.check_average_vector(average_vector, image_features)
    constants = {"image_teacher": image_teacher, "text_teacher": text_teacher, "average_vector": average_vector}
    options: dict[str, Any] = {
        "decay": decay,
        "average_weight": average_weight,
        "pairwise_weight": pairwise_weight,
        "mean_gradient": mean_gradient,
    }
    if not backends.uses_triton(backend, image_features, constants):
        return naive.difference_loss(image_features, text_features, **constants, **options, group=group)
    dtype = backends.primitives.compute_dtype(image_features.dtype)
    tensors = image_features, text_features, *(tensor.to(dtype) for tensor in constants.values())
    run = difference.apply if direct.is_eager(*tensors) else difference.forward
    loss, results, _ = run(*tensors, *options.values(), process_group.name_of(group))
    width = image_features.shape[1]
    return DifferenceLoss(loss, results[:width], *results[width:].unbind())


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
    backend: Backend = "auto",
) -> DiveLoss:
    """The objective of DiVE, Eq. 9: ``contrastive_loss(target) + weight * difference_loss(reference)``.

    The two batches may differ in size. The Triton kernels take three launches, backward included; separate losses
    take six.

    Args:
        image_features, text_features: ``(B, D)``, un-normalized features of the target batch.
        logit_scale: tensor of shape ``()`` or ``(1,)``, the scale ``1 / tau`` itself, not its logarithm.
        reference_image_features, reference_text_features: ``(B', D)``, un-normalized, of the reference batch.
        image_teacher, text_teacher: ``(B', D)``, unit rows of the frozen model for the reference batch.
        average_vector: ``(D,)``, m of the previous step; zeros before the first.
        weight: lambda; the paper has 1000 for CLIP ViT-B/16 at a learning rate of 1e-5.
        decay: of the average vector; the paper's alpha.
        average_weight, pairwise_weight: weights of AVL and PVL.
        mean_gradient: whether this batch's share of m carries gradient, as in the literal Eq. 6-7.
        group: ranks whose pairs form one batch (equal sizes on each); None: this rank alone.
        backend: "triton", "torch", or "auto": triton where it can run.

    Returns:
        Global values: ``loss``, ``contrastive_loss``, the updated ``average_vector`` for the next step,
        ``average_loss`` and ``pairwise_loss`` without weights, and the mean lengths ``image_norm`` and
        ``text_norm`` of u and v.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_pairs(image_features=image_features, text_features=text_features)
    checks.check_scale(logit_scale, image_features)
    checks.check_same_kind(image_features, reference_image_features)
    checks.check_pairs(
        reference_image_features=reference_image_features,
        reference_text_features=reference_text_features,
        image_teacher=image_teacher,
        text_teacher=text_teacher,
    )
    checks.check_average_vector(average_vector, reference_image_features)
    features = image_features, text_features, logit_scale, reference_image_features, reference_text_features
    constants = {"image_teacher": image_teacher, "text_teacher": text_teacher, "average_vector": average_vector}
    options: dict[str, Any] = {
        "weight": weight,
        "decay": decay,
        "average_weight": average_weight,
        "pairwise_weight": pairwise_weight,
        "mean_gradient": mean_gradient,
    }
    if not backends.uses_triton(backend, image_features, constants):
        return naive.dive_loss(*features, **constants, **options, group=group)
    dtype = backends.primitives.compute_dtype(image_features.dtype)
    tensors = *features, *(tensor.to(dtype) for tensor in constants.values())
    run = joint_step.apply if direct.is_eager(*tensors) else joint_step.forward
    loss, results, *_ = run(*tensors, *options.values(), process_group.name_of(group))
    width = reference_image_features.shape[1]
    *parts, contrastive_part = results[width:].unbind()
    return DiveLoss(loss, contrastive_part, results[:width], *parts)


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
    backend: Backend = "auto",
) -> DistillationLoss:
    """Distillation of features and of contrastive logits from a teacher of the same batch.

    Arguments, result and errors are those of :func:`dive_fast.kernels.naive.distillation_loss`. With the Triton
    kernels extra memory is linear in B.
    """
    checks.check_pairs(
        image_features=image_features,
        text_features=text_features,
        image_teacher=image_teacher,
        text_teacher=text_teacher,
    )
    checks.check_scale(logit_scale, image_features)
    checks.check_scale(teacher_scale, image_features, "teacher_scale")
    features = image_features, text_features, logit_scale
    teachers = image_teacher.detach(), text_teacher.detach(), teacher_scale.detach()
    weights: dict[str, Any] = {
        "feature_weight": feature_weight,
        "relational_weight": relational_weight,
        "interactive_weight": interactive_weight,
        "cross_weight": cross_weight,
    }
    if not any(weights.values()) or not backends.uses_triton(backend, image_features):
        return naive.distillation_loss(*features, *teachers, **weights, group=group)
    dtype = backends.primitives.compute_dtype(image_features.dtype)
    tensors = *features, *(tensor.to(dtype) for tensor in teachers)
    run = distillation.apply if direct.is_eager(*tensors) else distillation.forward
    loss, results, *_ = run(*tensors, *weights.values(), process_group.name_of(group))
    return DistillationLoss(loss, *results.unbind())


def gram_volume(first: Tensor, second: Tensor, third: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Volume that three unit vectors span, Eq. 8-9 of GRACE (arXiv 2603.27139), mean over rows.

    ::

        volume = mean over rows of sqrt(max(det G, 0) + e^2),   G_jk = z_j . z_k,   e = 1e-6;   z_j unit rows

    It is 1 for orthogonal vectors, and e for vectors in a plane.

    Args:
        first, second, third: ``(B, D)``, un-normalized features, with gradient; 0 where ``det G <= 0``.
        backend: as for :func:`contrastive_loss`.

    Returns:
        The mean of the volumes of this rank, ``()``, fp32 (fp64 for fp64 features).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_triple(first, second, third)
    if not backends.uses_triton(backend, first):
        return naive.gram_volume(first, second, third)
    run = volume.apply if direct.is_eager(first, second, third) else volume.forward
    return run(first, second, third)
