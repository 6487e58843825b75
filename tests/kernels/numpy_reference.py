"""The losses in float64 NumPy, written from the equations, with gradients derived by hand.

The code is independent of ``naive``, so that their agreement is evidence. Each value and each gradient comes with
a bound on the error of a computation whose operations have the relative error ``rounding``. The bounds are running
error analyses to first order, and serve as tolerances: a loss of difference vectors of 1e-3 inherits the rounding
of unit vectors, which are a thousand times longer.

``u``, ``v``, ``m`` and the equation numbers are those of DiVE, arXiv 2511.09973; the prefix ``d`` denotes the
derivative of the loss with respect to the variable.
"""

import math
from typing import NamedTuple

import numpy as np

CLAMP = 1e-12


class Evaluated(NamedTuple):
    """Values by the names of naive's results, and gradients of ``values["loss"]`` by argument name.

    A bound is a scalar, or ``(B, 1)``: the same for all components of a row.
    """

    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    value_bounds: dict[str, float]
    gradient_bounds: dict[str, np.ndarray]


def unit(features):
    return features / np.maximum(_norms(features), CLAMP)[:, None]


def contrastive_loss(image_features, text_features, logit_scale, *, rounding=0.0):
    """Contrastive loss, Eq. 1, one softmax at a time.

    With p = softmax(l): d/dl_k (log sum_k exp l_k - l_i) = p_k - [k = i], and l = s cos.
    """
    image, text = unit(image_features), unit(text_features)
    B, s = len(image), float(np.squeeze(logit_scale))
    cosine = image @ text.T
    losses, dscale, dcosine = [], 0.0, np.zeros((B, B))
    mass = np.zeros((B, B))  # the softmax terms without the labels, which nearly cancel in dcosine
    for i in range(B):
        for index in ((i, slice(None)), (slice(None), i)):  # all texts for image i, all images for text i
            cosines = cosine[index]
            log_sum = _log_sum_exp(s * cosines)
            error = np.exp(s * cosines - log_sum)
            mass[index] += error / (2 * B)
            error[i] -= 1.0
            losses.append(log_sum - s * cosines[i])
            dcosine[index] += s * error / (2 * B)
            dscale += np.dot(error, cosines) / (2 * B)
    loss = math.fsum(losses) / (2 * B)
    dimage, dtext = dcosine @ text, dcosine.T @ image

    # Errors in units of ``rounding``: s of a logit, twice that and 1 of a softmax, relative; 0 of the label's 1.
    softmax_error = rounding * (1 + 4 * s)
    dimage_error = s * (softmax_error * mass.sum(1) + rounding / B)
    dtext_error = s * (softmax_error * mass.sum(0) + rounding / B)
    gradients = {
        "image_features": _unit_backward(image_features, dimage),
        "text_features": _unit_backward(text_features, dtext),
        "logit_scale": np.reshape(dscale, np.shape(logit_scale)),
    }
    gradient_bounds = {
        "image_features": _unit_backward_bound(image_features, dimage, dimage_error, rounding),
        "text_features": _unit_backward_bound(text_features, dtext, dtext_error, rounding),
        "logit_scale": 2 * softmax_error * mass.sum() + rounding,
    }
    value_bounds = {"loss": rounding * (2 * s + math.log(B) + loss)}
    return Evaluated({"loss": np.float64(loss)}, gradients, value_bounds, gradient_bounds)


def difference_loss(
    image_features,
    text_features,
    image_teacher,
    text_teacher,
    average_vector,
    *,
    decay=0.99,
    average_weight=1.0,
    pairwise_weight=1.0,
    mean_gradient=True,
    rounding=0.0,
):
    """Average and pairwise vector loss, Eq. 4-8.

    With c = mean_j (u_j + v_j) / 2, m = decay m_prev + (1 - decay) c, and L the average loss::

        dm   = -(2 / B) sum_j (u_j - m + v_j - m)      = -4 (c - m)
        du_j =  (2 / B) (u_j - m) + (1 - decay) / (2 B) dm
    """
    image, text = unit(image_features), unit(text_features)
    B = len(image)
    u = image - image_teacher  # (4)
    v = text - text_teacher  # (5)
    center = sum((u[j] + v[j]) / 2 for j in range(B)) / B
    m = decay * average_vector + (1 - decay) * center  # (6)
    average_loss = sum(_square(u[j] - m) + _square(v[j] - m) for j in range(B)) / B  # (7)
    pairwise_loss = sum(_square(u[j] - v[j]) for j in range(B)) / B  # (8)
    values = {
        "loss": average_weight * average_loss + pairwise_weight * pairwise_loss,
        "average_vector": m,
        "average_loss": average_loss,
        "pairwise_loss": pairwise_loss,
        "image_norm": sum(_norms(u)) / B,
        "text_norm": sum(_norms(v)) / B,
    }

    dm = -4 * average_weight * (center - m) if mean_gradient else np.zeros_like(m)
    through_m = (1 - decay) / (2 * B) * dm
    dpair = 2 / B * pairwise_weight * (u - v)
    dimage = 2 / B * average_weight * (u - m) + through_m + dpair
    dtext = 2 / B * average_weight * (v - m) + through_m - dpair
    gradients = {
        "image_features": _unit_backward(image_features, dimage),
        "text_features": _unit_backward(text_features, dtext),
        "image_teacher": -dimage,
        "text_teacher": -dtext,
        "average_vector": decay * dm,
    }

    # Lengths of the errors of each u and v (mostly those of their unit vectors), of m, and of the squared vectors.
    u_error = rounding * (_norms(image) + _norms(u))
    v_error = rounding * (_norms(text) + _norms(v))
    center_error = (u_error + v_error).mean() / 2 + rounding * _norms(center)
    m_error = (1 - decay) * center_error + rounding * (decay * _norms(average_vector) + _norms(m))
    u_to_m_error = u_error + m_error + rounding * _norms(u - m)
    v_to_m_error = v_error + m_error + rounding * _norms(v - m)
    pair_error = u_error + v_error + rounding * _norms(u - v)
    average_bound = _mean_square_bound(u - m, u_to_m_error, rounding)
    average_bound += _mean_square_bound(v - m, v_to_m_error, rounding)
    pairwise_bound = _mean_square_bound(u - v, pair_error, rounding)
    value_bounds = {
        "loss": average_weight * average_bound + pairwise_weight * pairwise_bound + rounding * values["loss"],
        "average_vector": m_error,
        "average_loss": average_bound,
        "pairwise_loss": pairwise_bound,
        "image_norm": u_error.mean() + rounding * values["image_norm"],
        "text_norm": v_error.mean() + rounding * values["text_norm"],
    }
    dm_error = 4 * average_weight * (center_error + m_error) + rounding * _norms(dm)
    through_m_error = (1 - decay) / (2 * B) * dm_error
    dimage_error = 2 / B * (average_weight * u_to_m_error + pairwise_weight * pair_error) + through_m_error
    dtext_error = 2 / B * (average_weight * v_to_m_error + pairwise_weight * pair_error) + through_m_error
    gradient_bounds = {
        "image_features": _unit_backward_bound(image_features, dimage, dimage_error, rounding),
        "text_features": _unit_backward_bound(text_features, dtext, dtext_error, rounding),
        "image_teacher": (dimage_error + rounding * _norms(dimage))[:, None],
        "text_teacher": (dtext_error + rounding * _norms(dtext))[:, None],
        "average_vector": decay * dm_error,
    }
    return Evaluated(values, gradients, value_bounds, gradient_bounds)


def dive_loss(
    image_features,
    text_features,
    logit_scale,
    reference_image_features,
    reference_text_features,
    image_teacher,
    text_teacher,
    average_vector,
    *,
    weight=1000.0,
    rounding=0.0,
    **options,
):
    """Joint loss, Eq. 9."""
    target = contrastive_loss(image_features, text_features, logit_scale, rounding=rounding)
    reference = difference_loss(
        reference_image_features,
        reference_text_features,
        image_teacher,
        text_teacher,
        average_vector,
        rounding=rounding,
        **options,
    )
    loss = target.values["loss"] + weight * reference.values["loss"]
    bound = target.value_bounds["loss"] + weight * reference.value_bounds["loss"] + rounding * loss

    def rename_and_weight(gradients):
        names = {"image_features": "reference_image_features", "text_features": "reference_text_features"}
        return {names.get(name, name): weight * gradient for name, gradient in gradients.items()}

    return Evaluated(
        reference.values | {"loss": loss, "contrastive_loss": target.values["loss"]},
        target.gradients | rename_and_weight(reference.gradients),
        reference.value_bounds | {"loss": bound, "contrastive_loss": target.value_bounds["loss"]},
        target.gradient_bounds | rename_and_weight(reference.gradient_bounds),
    )


def distillation_loss(
    image_features,
    text_features,
    logit_scale,
    image_teacher,
    text_teacher,
    teacher_scale,
    *,
    feature_weight=0.0,
    relational_weight=0.0,
    interactive_weight=0.0,
    cross_weight=0.0,
    rounding=0.0,
):
    """Distillation of features and of logits from a teacher, one softmax at a time, and one side after the other.

    With p, p~ and r the softmax of student, teacher and mixed logits, KL(p~ || p) has the derivative p - p~ by the
    student's logits, and p~_k (log p~_k / p_k - KL) by the teacher's, through which the teacher's errors enter.
    """
    z, teachers = (unit(image_features), unit(text_features)), (image_teacher, text_teacher)
    (B, D), s, ts = image_features.shape, float(np.squeeze(logit_scale)), float(np.squeeze(teacher_scale))
    error, teacher_error = rounding * (1 + 4 * s), rounding * (1 + 4 * ts)  # of a softmax, relative
    terms, bounds = np.zeros(5), np.zeros(5)  # feature, relational, interactive, cross, entropy
    dz, dz_error = [np.zeros((B, D)), np.zeros((B, D))], [np.zeros(B), np.zeros(B)]
    dscale = dscale_error = 0.0
    for side, other in (0, 1), (1, 0):
        difference = z[side] - teachers[side]
        difference_error = rounding * (1 + _norms(difference))
        terms[0] += np.square(difference).sum() / (B * D)
        bounds[0] += _mean_square_bound(difference, difference_error, rounding) / D
        dz[side] += 2 * feature_weight / (B * D) * difference
        dz_error[side] += 2 * feature_weight / (B * D) * difference_error
        cosine, mixed_cosine = z[side] @ z[other].T, z[side] @ teachers[other].T
        teacher_logits = ts * teachers[side] @ teachers[other].T
        for i in range(B):
            log_p, log_t, log_r = (
                logits - _log_sum_exp(logits) for logits in (s * cosine[i], teacher_logits[i], s * mixed_cosine[i])
            )
            p, t, r = np.exp(log_p), np.exp(log_t), np.exp(log_r)
            label = np.arange(B) == i
            kl, cross = np.dot(t, log_t - log_p), np.dot(t, log_t - log_r)
            terms[1:] += np.array([kl, -log_r[i], cross, -np.dot(t, log_t)]) / (2 * B)
            sums = rounding * (math.log(B) + 1)
            for index, value, q in (1, kl, log_p), (3, cross, log_r):
                by_student = 4 * s * np.abs(np.exp(q) - t).sum()
                by_teacher = 4 * ts * np.dot(t, np.abs(log_t - q - value))
                bounds[index] += (rounding * (by_student + by_teacher + value) + sums) / (2 * B)
            bounds[2] += (rounding * (2 * s - log_r[i]) + sums) / (2 * B)
            entropy = -np.dot(t, log_t)
            bounds[4] += (rounding * (4 * ts * np.dot(t, np.abs(log_t + entropy)) + entropy) + sums) / (2 * B)

            dlogits = relational_weight * (p - t) / (2 * B)
            dmixed = (interactive_weight * (r - label) + cross_weight * (r - t)) / (2 * B)
            dz[side][i] += s * (dlogits @ z[other] + dmixed @ teachers[other])
            dz[other] += s * np.outer(dlogits, z[side][i])
            dscale += np.dot(dlogits, cosine[i]) + np.dot(dmixed, mixed_cosine[i])
            # Errors of all weights but the label's 1, whose is one rounding.
            weight_error = relational_weight * (error * p + teacher_error * t) / (2 * B)
            mixed_error = (interactive_weight + cross_weight) * error * r + cross_weight * teacher_error * t
            mixed_error = (mixed_error + interactive_weight * rounding * label) / (2 * B)
            dz_error[side][i] += s * (weight_error.sum() + mixed_error.sum())
            dz_error[other] += s * weight_error
            dscale_error += 2 * (weight_error.sum() + mixed_error.sum())
    weights = np.array([feature_weight, relational_weight, interactive_weight, cross_weight])
    loss = np.dot(weights, terms[:4])
    used = np.append(weights, relational_weight) != 0
    names = ("feature_loss", "relational_loss", "interactive_loss", "cross_loss", "teacher_entropy")
    features = {"image_features": image_features, "text_features": text_features}
    return Evaluated(
        dict(zip(names, np.where(used, terms, 0.0))) | {"loss": np.float64(loss)},
        {name: _unit_backward(x, dz[side]) for side, (name, x) in enumerate(features.items())}
        | {"logit_scale": np.reshape(dscale, np.shape(logit_scale))},
        dict(zip(names, bounds)) | {"loss": np.dot(weights, bounds[:4]) + rounding * abs(loss)},
        {
            name: _unit_backward_bound(x, dz[side], dz_error[side], rounding)
            for side, (name, x) in enumerate(features.items())
        }
        | {"logit_scale": dscale_error},
    )


def gram_volume(first, second, third, *, rounding=0.0):
    """Mean volume of three unit rows: the area of two, by a QR decomposition, times the distance to their plane.

    With A_j the area of the other two and h_j the part of z_j that is orthogonal to them, the volume is A_j |h_j|,
    and its square has the derivative 2 A_j^2 h_j by z_j, for each j.
    """
    features = {"first": first, "second": second, "third": third}
    B, floor = len(first), 1e-6
    z = [unit(x) for x in features.values()]
    dz, dz_error = [np.zeros_like(first) for _ in z], [np.zeros(B) for _ in z]
    loss = bound = 0.0
    for i in range(B):
        rows = [side[i] for side in z]
        squares = [_orthogonal_part(rows[j], rows[:j] + rows[j + 1 :]) for j in range(3)]
        # All three squares are equal; the one with the largest part has the smallest error.
        square = max((area * _square(part) for area, part in squares), key=float)
        volume = math.sqrt(square + floor**2)
        loss += volume / B
        # Errors of the formula in differences: of its terms, and of unit rows, which move the volume by an area.
        aa, bb = (_square(row - rows[0]) for row in rows[1:])
        areas = sum(math.sqrt(area) for area, _ in squares)
        square_error = rounding * (6 * aa * bb + 2 * areas * math.sqrt(square)) + (rounding * areas) ** 2
        lowest = math.sqrt(max(square - square_error, 0.0) + floor**2)
        bound += (math.sqrt(square + square_error + floor**2) - lowest + rounding * volume) / B
        for j, (area, part) in enumerate(squares):
            dsquare = 2 * area * part
            dz[j][i] = dsquare / (2 * volume * B)
            terms = 4 * rounding * (math.sqrt(aa) + math.sqrt(bb)) ** 2
            if square <= square_error:
                terms += np.linalg.norm(dsquare)  # the determinant may be negative, which has no gradient
            dz_error[j][i] = (np.linalg.norm(dsquare) * (volume / lowest - 1) + terms) / (2 * lowest * B)
    return Evaluated(
        {"loss": np.float64(loss)},
        {name: _unit_backward(x, dz[j]) for j, (name, x) in enumerate(features.items())},
        {"loss": bound},
        {
            name: _unit_backward_bound(x, dz[j], dz_error[j], rounding)
            for j, (name, x) in enumerate(features.items())
        },
    )


def _orthogonal_part(vector, others):
    """Squared area of two vectors, and the part of ``vector`` that is orthogonal to both."""
    basis, lengths = np.linalg.qr(np.pad(np.stack(others, 1), ((0, max(0, 2 - len(vector))), (0, 0))))
    basis = basis[: len(vector)]
    for _ in range(2):  # a second time, since the first leaves rounding errors of the vector's length
        vector = vector - basis @ (basis.T @ vector)
    return (lengths[0, 0] * lengths[1, 1]) ** 2, vector


def _unit_backward(features, dz):
    """Backward of z = x / |x|: dx = (dz - z (z . dz)) / |x|. Below the clamp z = x / 1e-12 is linear in x."""
    dx = np.empty_like(features)
    for j, norm in enumerate(_norms(features)):
        if norm < CLAMP:
            dx[j] = dz[j] / CLAMP
        else:
            z = features[j] / norm
            dx[j] = (dz[j] - z * np.dot(z, dz[j])) / norm
    return dx


def _unit_backward_bound(features, dz, dz_error, rounding):
    return ((2 * dz_error + 3 * rounding * _norms(dz)) / np.maximum(_norms(features), CLAMP))[:, None]


def _mean_square_bound(rows, errors, rounding):
    """Bound for mean_j |row_j|^2, to second order in the errors, because rows may be zero."""
    norms = _norms(rows)
    return np.mean(2 * norms * errors + errors**2 + rounding * norms**2)


def _log_sum_exp(logits):
    highest = logits.max()
    return highest + math.log(np.exp(logits - highest).sum())


def _norms(rows):
    return np.sqrt((rows * rows).sum(-1))


def _square(vector):
    return np.dot(vector, vector)
