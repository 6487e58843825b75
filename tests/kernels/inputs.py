"""Numerically hard batches and the evaluation of the losses on them, shared by the tests of the kernels."""

import numpy as np
import torch

CONTRASTIVE = ("image_features", "text_features", "logit_scale")
DISTILLATION = (*CONTRASTIVE, "image_teacher", "text_teacher", "teacher_scale")
DIFFERENCE = ("image_features", "text_features", "image_teacher", "text_teacher", "average_vector")
TRIPLE = ("first", "second", "third")


# Inputs


def random_pairs(random, pairs, width):
    """Unrelated teacher and student: difference vectors longer than 1."""
    return _with_norms(random, _directions(random, 2, pairs, width)), _directions(random, 2, pairs, width)


def drifted_pairs(random, pairs, width):
    """Difference vectors of length 1e-4 to 0.9 in one batch, the range of fine-tuning and more."""
    teacher = _directions(random, 2, pairs, width)
    lengths = np.geomspace(1e-4, 0.9, 2 * pairs).reshape(2, pairs, 1)
    return _with_norms(random, teacher + lengths * _directions(random, 2, pairs, width)), teacher


def equalised_pairs(random, pairs, width):
    """Nearly equal difference vectors, the optimum of the loss, where all squared terms nearly cancel."""
    teacher = _directions(random, 2, pairs, width)
    features = teacher + 1e-2 * _directions(random, 1, 1, width) + 1e-5 * _directions(random, 2, pairs, width)
    return _with_norms(random, features), teacher


def duplicated_pairs(random, pairs, width):
    """Every pair three times, as classes repeat within a batch: other logits equal the positive one."""
    features, teacher = drifted_pairs(random, pairs, width)
    return features[:, np.arange(pairs) // 3], teacher[:, np.arange(pairs) // 3]


def opposed_pairs(random, pairs, width):
    """Cosines at both limits and wrong: -1 within the first pair, +1 between its text and all other images."""
    features, teacher = random_pairs(random, pairs, width)
    features[:, :] = features[0, 0]
    features[0, 0] *= -1
    return features, teacher


def vanishing_pairs(random, pairs, width):
    """Rows with norms near and far below the clamp of the normalization, and rows of zeros."""
    norms = np.resize([3e-12, 1.0, 1e-13, 1e-20, 0.0], 2 * pairs).reshape(pairs, 2).T[..., None]
    return norms * _directions(random, 2, pairs, width), _directions(random, 2, pairs, width)


def outlying_pairs(random, pairs, width):
    """One row a million times longer than the others, and one component far larger than the rest of its row."""
    features, teacher = drifted_pairs(random, pairs, width)
    features[0, -1] *= 1e6
    features[1, 0, width // 2] = 1e4
    return features, teacher


def confident_pairs(random, pairs, width):
    """Nearly equal images and texts, as after training: the label's logit is far above all others."""
    features, teacher = drifted_pairs(random, pairs, width)
    features[1] = features[0] + 1e-2 * np.linalg.norm(features[0], axis=-1, keepdims=True) * _directions(
        random, pairs, width
    )
    return features, teacher


KINDS = (
    random_pairs,
    drifted_pairs,
    equalised_pairs,
    duplicated_pairs,
    opposed_pairs,
    vanishing_pairs,
    outlying_pairs,
)


def make_inputs(kind, pairs, width, seed=0):
    """All arguments of the losses of one batch, as float64 arrays; tests replace the scale."""
    random = np.random.default_rng([seed, pairs, width])
    (image, text), (image_teacher, text_teacher) = kind(random, pairs, width)
    return {
        "image_features": image,
        "text_features": text,
        "logit_scale": np.array(1 / 0.07),
        "image_teacher": image_teacher,
        "text_teacher": text_teacher,
        "average_vector": 1e-2 * random.standard_normal(width),
        "teacher_scale": np.array(1 / 0.05),
    }


def make_triple(kind, rows, width, seed=0):
    """Arguments of the volume: images, texts and image teachers of a batch, as float64 arrays."""
    inputs = make_inputs(kind, rows, width, seed)
    return dict(zip(TRIPLE, (inputs["image_features"], inputs["text_features"], 3 * inputs["image_teacher"])))


def make_dive_inputs(kind, pairs, reference_pairs, width, seed=0):
    """All arguments of the joint loss; the target batch and the reference batch may differ in size."""
    reference = select(make_inputs(kind, reference_pairs, width, seed + 1), DIFFERENCE)
    reference["reference_image_features"] = reference.pop("image_features")
    reference["reference_text_features"] = reference.pop("text_features")
    return select(make_inputs(kind, pairs, width, seed), CONTRASTIVE) | reference


def select(inputs, names):
    return {name: inputs[name] for name in names}


def _directions(random, *shape):
    rows = random.standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _with_norms(random, rows):
    return rows * 10 ** random.uniform(0, 2, (*rows.shape[:-1], 1))


# Evaluation


def to_tensors(inputs, dtype=torch.float64, dtypes=()):
    """Leaf tensors that require a gradient; ``dtypes`` has the dtypes by name that differ from ``dtype``."""
    tensors = {name: torch.tensor(array).to(dict(dtypes).get(name, dtype)) for name, array in inputs.items()}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def evaluate(function, tensors, **options):
    """Values and gradients of a loss, by name."""
    result = function(**tensors, **options)
    values = {"loss": result} if isinstance(result, torch.Tensor) else result._asdict()
    values["loss"].backward()
    # A tensor that the loss does not depend on has no gradient, which means zero.
    gradients = {key: torch.zeros_like(t) if t.grad is None else t.grad for key, t in tensors.items()}
    return {key: value.detach() for key, value in values.items()}, gradients
