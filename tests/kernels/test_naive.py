"""``naive``, the reference of all faster paths, against NumPy, formula by formula."""

import inspect
import itertools
import math

import numpy as np
import numpy_reference
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import (
    CONTRASTIVE,
    DIFFERENCE,
    KINDS,
    TRIPLE,
    drifted_pairs,
    evaluate,
    make_dive_inputs,
    make_inputs,
    make_triple,
    random_pairs,
    select,
    to_tensors,
    vanishing_pairs,
)

import dive_fast.kernels as kernels
from dive_fast.kernels import naive

BATCH_SIZES = (1, 2, 3, 7, 64, 70)
WIDTHS = (1, 3, 16, 130)
# Allowed error of one operation in units of the machine epsilon, sums over width and batch included.
OPERATION = 8

# Default weights, each one switched off, and values that do not agree by chance.
DIFFERENCE_OPTIONS = [
    {"decay": decay, "average_weight": average, "pairwise_weight": pairwise, "mean_gradient": mean_gradient}
    for (average, pairwise), decay, mean_gradient in itertools.product(
        [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 2.5)], [0.0, 0.5, 0.99], [True, False]
    )
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are too small for threads to save time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Comparison


def assert_equals_numpy(name, tensors, compute_dtype=torch.float64, **options):
    """Values and gradients of ``naive`` equal NumPy's on the same numbers within the bounds of rounding errors."""
    values, gradients = evaluate(getattr(naive, name), tensors, **options)
    expected = getattr(numpy_reference, name)(
        **{key: tensor.detach().double().numpy() for key, tensor in tensors.items()},
        **options,
        rounding=OPERATION * torch.finfo(compute_dtype).eps,
    )
    assert values.keys() == expected.values.keys()
    for key, value in values.items():
        assert value.dtype == compute_dtype, key
        assert_within(value, expected.values[key], expected.value_bounds[key], key)
    assert gradients.keys() == expected.gradients.keys()
    for key, gradient in gradients.items():
        assert gradient.dtype == tensors[key].dtype, key
        bound = expected.gradient_bounds[key]
        if gradient.dtype != compute_dtype:
            # Half precision rounds the final gradient, also to a multiple of its smallest number.
            info = torch.finfo(gradient.dtype)
            bound = bound + info.eps / 2 * abs(expected.gradients[key]) + info.smallest_normal * info.eps / 2
        assert_within(gradient, expected.gradients[key], bound, f"gradient of {key}")


def assert_within(actual, expected, bound, name):
    actual = actual.double().numpy()
    assert actual.shape == np.shape(expected), name
    assert np.isfinite(bound).all(), name
    error = np.abs(actual - expected)
    assert (error <= bound).all(), f"{name}: off by {error.max()}, allowed {np.max(bound)}"


# float64 against NumPy


@pytest.mark.parametrize("pairs", BATCH_SIZES)
@pytest.mark.parametrize("kind", KINDS)
class TestAgainstNumpy:
    def test_unit(self, kind, pairs):
        for width in WIDTHS:
            features = make_inputs(kind, pairs, width)["image_features"]
            assert_within(naive.unit(torch.tensor(features)), numpy_reference.unit(features), 1e-15, "unit")

    def test_contrastive_loss(self, kind, pairs):
        for width in WIDTHS:
            inputs = select(make_inputs(kind, pairs, width), CONTRASTIVE)
            for scale in np.array(0.5), np.array([1 / 0.07]), np.array(100.0):
                assert_equals_numpy("contrastive_loss", to_tensors(inputs | {"logit_scale": scale}))

    def test_difference_loss(self, kind, pairs):
        for width in WIDTHS:
            inputs = select(make_inputs(kind, pairs, width), DIFFERENCE)
            for options in DIFFERENCE_OPTIONS:
                assert_equals_numpy("difference_loss", to_tensors(inputs), **options)

    def test_dive_loss(self, kind, pairs):
        for width in WIDTHS:
            inputs = make_dive_inputs(kind, pairs, pairs // 2 + 1, width)
            for weight, options in zip((1000.0, 0.0, 2.5), DIFFERENCE_OPTIONS[-3:]):
                assert_equals_numpy("dive_loss", to_tensors(inputs), weight=weight, **options)

    def test_gram_volume(self, kind, pairs):
        for width in WIDTHS:
            assert_equals_numpy("gram_volume", to_tensors(make_triple(kind, pairs, width)))


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("difference_loss", {"decay": 0.99, "average_weight": 1.0, "pairwise_weight": 1.0, "mean_gradient": True}),
        ("dive_loss", {"weight": 1000.0, "decay": 0.99, "mean_gradient": True}),
    ],
)
def test_defaults_are_those_of_the_paper(name, defaults):
    parameters = inspect.signature(getattr(naive, name)).parameters
    assert {key: parameters[key].default for key in defaults} == defaults


@pytest.mark.parametrize("mean_gradient", [True, False])
def test_only_the_loss_carries_gradient(mean_gradient):
    tensors = to_tensors(make_dive_inputs(random_pairs, 3, 2, 4))
    result = naive.dive_loss(**tensors, mean_gradient=mean_gradient)._asdict()
    assert [key for key, value in result.items() if value.requires_grad] == ["loss"]


# NumPy against finite differences


@pytest.mark.parametrize(("pairs", "width"), [(1, 1), (1, 4), (2, 3), (4, 5)])
@pytest.mark.parametrize("kind", KINDS)
class TestNumpyGradients:
    @pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
    def test_contrastive_loss(self, kind, pairs, width, scale):
        inputs = select(make_inputs(kind, pairs, width), CONTRASTIVE) | {"logit_scale": np.array(scale)}
        gradients = numpy_reference.contrastive_loss(**inputs).gradients
        assert_finite_differences_agree(numpy_reference.contrastive_loss, inputs, gradients)

    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
    def test_difference_loss(self, kind, pairs, width, decay):
        inputs = select(make_inputs(kind, pairs, width), DIFFERENCE)
        weights = {"average_weight": 0.3, "pairwise_weight": 2.5}
        gradients = numpy_reference.difference_loss(**inputs, **weights, decay=decay).gradients
        assert_finite_differences_agree(numpy_reference.difference_loss, inputs, gradients, **weights, decay=decay)

    def test_difference_loss_with_constant_average(self, kind, pairs, width):
        inputs = select(make_inputs(kind, pairs, width), DIFFERENCE)
        evaluated = numpy_reference.difference_loss(**inputs, decay=0.5, mean_gradient=False)
        assert not evaluated.gradients.pop("average_vector").any()
        # With decay 1 the average vector equals the argument for any batch, and so is a constant.
        constant = inputs | {"average_vector": evaluated.values["average_vector"]}
        assert_finite_differences_agree(numpy_reference.difference_loss, constant, evaluated.gradients, decay=1.0)


def test_numpy_gradients_of_dive_loss():
    inputs = make_dive_inputs(random_pairs, 3, 2, 4)
    gradients = numpy_reference.dive_loss(**inputs, weight=2.5).gradients
    assert_finite_differences_agree(numpy_reference.dive_loss, inputs, gradients, weight=2.5)


@pytest.mark.parametrize(("rows", "width"), [(1, 3), (4, 5), (3, 17)])
def test_numpy_gradients_of_gram_volume(rows, width):
    """Only far from planes: the volume has a kink there, at the scale of its epsilon."""
    inputs = make_triple(random_pairs, rows, width)
    gradients = numpy_reference.gram_volume(**inputs).gradients
    assert_finite_differences_agree(numpy_reference.gram_volume, inputs, gradients)


def assert_finite_differences_agree(function, inputs, gradients, **options):
    """Gradients equal five-point central differences of the loss, with steps relative to the row's length."""

    def loss(name, index, offset):
        shifted = inputs[name].copy()
        shifted[index] += offset
        return function(**inputs | {name: shifted}, **options).values["loss"]

    for name, gradient in gradients.items():
        for index in np.ndindex(inputs[name].shape):
            size = 1.0
            if name.endswith("features") or name in TRIPLE:
                # The loss varies on the scale of the row's length, or of the clamp.
                size = max(np.linalg.norm(inputs[name][index[0]]), numpy_reference.CLAMP)
            step = 3e-5 * size
            near = loss(name, index, step) - loss(name, index, -step)
            far = loss(name, index, 2 * step) - loss(name, index, -2 * step)
            expected = (8 * near - far) / (12 * step) * size
            assert gradient[index] * size == pytest.approx(expected, rel=1e-7, abs=1e-7), (name, index)


# Lower precision against NumPy on the same rounded numbers


PRECISIONS = [
    pytest.param(features, teacher, kind, id=f"{features}-{teacher}-{kind.__name__}".replace("torch.", ""))
    for features, teacher in [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ]
    for kind in KINDS
    # In float16 a row below the clamp is a row of zeros, and its gradient, dz / 1e-12, is out of range.
    if not (features == torch.float16 and kind == vanishing_pairs)
]


@pytest.mark.parametrize(("features", "teacher", "kind"), PRECISIONS)
class TestPrecision:
    SHAPES = ((1, 3), (7, 1), (2, 16), (7, 130), (70, 512))

    def test_contrastive_loss(self, features, teacher, kind):
        for pairs, width in self.SHAPES:
            inputs = select(make_inputs(kind, pairs, width), CONTRASTIVE)
            for scale in 1 / 0.07, 100.0:
                self.check("contrastive_loss", inputs | {"logit_scale": np.array([scale])}, features, teacher)

    def test_difference_loss(self, features, teacher, kind):
        for pairs, width in self.SHAPES:
            inputs = select(make_inputs(kind, pairs, width), DIFFERENCE)
            for options in {}, {"decay": 0.5, "pairwise_weight": 2.5, "mean_gradient": False}:
                self.check("difference_loss", inputs, features, teacher, **options)

    def test_dive_loss(self, features, teacher, kind):
        for pairs, width in self.SHAPES:
            inputs = make_dive_inputs(kind, pairs, pairs // 2 + 1, width)
            self.check("dive_loss", inputs, features, teacher)

    def test_gram_volume(self, features, teacher, kind):
        if features == teacher:
            for pairs, width in self.SHAPES:
                inputs = make_triple(kind, pairs, width)
                limit = torch.finfo(features).max / 2
                inputs = {key: np.clip(array, -limit, limit) for key, array in inputs.items()}
                assert_equals_numpy("gram_volume", to_tensors(inputs, features), compute_dtype=torch.float32)

    def check(self, name, inputs, features, teacher, **options):
        dtypes = {"logit_scale": torch.float32, "average_vector": torch.float32}
        dtypes |= {"image_teacher": teacher, "text_teacher": teacher}
        limit = torch.finfo(features).max / 2
        inputs = {key: np.clip(array, -limit, limit) for key, array in inputs.items()}
        assert_equals_numpy(name, to_tensors(inputs, features, dtypes), compute_dtype=torch.float32, **options)


def test_float64_features_keep_precision_with_float32_teacher():
    inputs = select(make_inputs(drifted_pairs, 7, 16), DIFFERENCE)
    dtypes = dict.fromkeys(("image_teacher", "text_teacher", "average_vector"), torch.float32)
    assert_equals_numpy("difference_loss", to_tensors(inputs, torch.float64, dtypes))


# The volume of three vectors


def triple_of(*cosines, dtype=torch.float64):
    """Three vectors of lengths 1, 2 and 3 with the cosines of 1 and 2, 1 and 3, 2 and 3."""
    gram = torch.eye(3, dtype=torch.float64)
    for (row, column), cosine in zip(((0, 1), (0, 2), (1, 2)), cosines, strict=True):
        gram[row, column] = gram[column, row] = cosine
    lengths = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    return (lengths * torch.linalg.cholesky(gram)).to(dtype)[:, None].unbind()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("cosines", "volume"),
    [
        ((0.0, 0.0, 0.0), 1.0),
        ((0.9, 0.9, 0.9), 0.028**0.5),
        ((0.95, 0.9, 0.85), 0.0185**0.5),
        ((0.8, 0.8, 0.8), 0.104**0.5),
    ],
)
def test_volume_of_known_cosines(cosines, volume, dtype):
    """det G = 1 + 2 c12 c13 c23 - c12^2 - c13^2 - c23^2."""
    vectors = triple_of(*cosines, dtype=dtype)
    for order in itertools.permutations(vectors):
        assert naive.gram_volume(*order).item() == pytest.approx(
            volume, abs=1e-11 if dtype.itemsize == 8 else 3e-7
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_volume_in_a_plane_is_its_epsilon(dtype):
    x, y = torch.eye(4, dtype=dtype)[:2, None].unbind()
    zero = torch.zeros_like(x)
    for triple in (
        (x, x, x),
        (x, y, y),
        (y, x, y),
        (x, y, -x),
        (x, y, x + y),
        (zero, x, y),
        (x, zero, y),
        (x, y, zero),
    ):
        leaves = [vector.clone().requires_grad_() for vector in triple]
        volume = naive.gram_volume(*leaves)
        assert volume.item() == pytest.approx(naive.VOLUME_EPS, abs=3e-4 if x + y is triple[2] else 1e-12)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(volume, leaves))


def test_volume_of_one_degree_keeps_its_digits_in_fp32():
    """The determinant of G itself is off by a third there."""
    tilt = math.radians(1.0)
    first, second, third = (
        torch.tensor([[1.0, a, b, 0.0]]) for a, b in ((0.0, 0.0), (tilt, 0.0), (0.5 * tilt, tilt))
    )
    exact = naive.gram_volume(first.double(), second.double(), third.double()).item()
    assert naive.gram_volume(first, second, third).item() == pytest.approx(exact, rel=1e-4)


@given(pairs=st.integers(1, 9), width=st.integers(3, 20), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_volume_has_no_order_and_no_length(pairs, width, seed):
    inputs = list(make_triple(random_pairs, pairs, width, seed).values())
    expected = naive.gram_volume(*map(torch.tensor, inputs))
    random = np.random.default_rng(seed)
    for order in itertools.permutations(inputs):
        scaled = [torch.tensor(array * 10 ** random.uniform(-5, 5, (pairs, 1))) for array in order]
        torch.testing.assert_close(naive.gram_volume(*scaled), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("argument", TRIPLE)
@pytest.mark.parametrize(
    "wrong", [{"size": (4,)}, {"size": (0, 4)}, {"size": (3, 4), "dtype": torch.float64}, {"size": (3, 4, 1)}]
)
def test_volume_of_unequal_matrices_is_an_error(argument, wrong):
    inputs = dict.fromkeys(TRIPLE, torch.ones(3, 4)) | {argument: torch.ones(**wrong)}
    # The others are compared with the first one.
    named = "second" if argument == "first" and "dtype" in wrong else argument
    for function in naive.gram_volume, kernels.gram_volume:
        with pytest.raises(ValueError, match=rf"^{named}: expected "):
            function(**inputs)


# Ranks


RANK_CASES = [
    pytest.param(name, options, pairs, width, dtype, id=f"{name}-{pairs}x{width}-{dtype}".replace("torch.", ""))
    for (name, options), (pairs, width), dtype in itertools.product(
        [
            ("contrastive_loss", {}),
            ("difference_loss", {"decay": 0.5, "average_weight": 0.3, "pairwise_weight": 2.5}),
            ("difference_loss", {"decay": 0.5, "mean_gradient": False}),
            ("dive_loss", {"weight": 2.5, "decay": 0.9, "mean_gradient": False}),
        ],
        [(1, 1), (1, 5), (2, 3), (5, 16)],  # pairs are those of one rank
        [torch.float64, torch.float32],
    )
]
# The ranks of each group, by its size. The pair is without rank 0, so that ranks have other numbers within it.
GROUPS = {1: [2], 2: [1, 2], 3: [0, 1, 2]}
SHARED = ("logit_scale", "average_vector")  # equal on all ranks; all other arguments have one row per pair


def global_inputs(name, pairs, width):
    if name == "dive_loss":
        return make_dive_inputs(drifted_pairs, pairs, 2 * pairs, width)
    names = {"contrastive_loss": CONTRASTIVE, "difference_loss": DIFFERENCE}[name]
    return select(make_inputs(drifted_pairs, pairs, width), names)


def evaluate_on_rank():
    """Values and gradients of this rank for every case and every group of which it is a member."""
    results = {}
    for world_size, members in GROUPS.items():
        group = dist.new_group(members)
        if dist.get_rank() not in members:
            continue
        for case, parameters in enumerate(RANK_CASES):
            name, options, pairs, width, dtype = parameters.values
            inputs = global_inputs(name, world_size * pairs, width)
            for key in inputs.keys() - set(SHARED):
                inputs[key] = np.split(inputs[key], world_size)[dist.get_rank(group)]
            # Column-major: tensors must be made contiguous before they are gathered.
            inputs = {key: np.array(array, order="F") for key, array in inputs.items()}
            tensors = {key: torch.from_numpy(array).to(dtype).requires_grad_() for key, array in inputs.items()}
            results[world_size, case] = evaluate(getattr(naive, name), tensors, **options, group=group)
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(3, evaluate_on_rank)


@pytest.mark.parametrize("world_size", GROUPS)
class TestRanks:
    @pytest.mark.parametrize("case", range(len(RANK_CASES)))
    def test_values_are_bit_identical_on_all_ranks(self, ranks, world_size, case):
        first, *others = [ranks[rank][world_size, case][0] for rank in GROUPS[world_size]]
        for other in others:
            for key in first:
                assert torch.equal(other[key], first[key]), key

    @pytest.mark.parametrize(("name", "options", "pairs", "width", "dtype"), RANK_CASES)
    def test_ranks_give_the_result_of_one_process(self, ranks, world_size, name, options, pairs, width, dtype):
        tensors = to_tensors(global_inputs(name, world_size * pairs, width), dtype)
        values, gradients = evaluate(getattr(naive, name), tensors, **options)
        bounds = getattr(numpy_reference, name)(
            **{key: tensor.detach().double().numpy() for key, tensor in tensors.items()},
            **options,
            rounding=OPERATION * torch.finfo(dtype).eps,
        )
        case = [parameters.values for parameters in RANK_CASES].index((name, options, pairs, width, dtype))
        on_ranks = [ranks[rank][world_size, case] for rank in GROUPS[world_size]]
        for key, value in values.items():
            assert_within(on_ranks[0][0][key], value.double().numpy(), bounds.value_bounds[key], key)
        for key, gradient in gradients.items():
            parts = [gradients_of_rank[key] for _, gradients_of_rank in on_ranks]
            # A parameter's gradient is averaged over ranks. The part through a rank's rows is on one rank only and
            # must be W times as large; the gradient of an argument that all ranks share is averaged unchanged.
            actual = torch.stack(parts).mean(0) if key in SHARED else torch.cat(parts) / world_size
            assert_within(actual, gradient.double().numpy(), bounds.gradient_bounds[key], f"gradient of {key}")


def test_autocast_does_not_affect_logits():
    inputs = to_tensors(make_inputs(drifted_pairs, 16, 32, 0))
    arguments = {key: value.float() for key, value in select(inputs, CONTRASTIVE).items()}
    expected = naive.contrastive_loss(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(naive.contrastive_loss(**arguments), expected)


# Bad input


VALID = {
    "contrastive_loss": dict.fromkeys(CONTRASTIVE[:2], (3, 4)) | {"logit_scale": ()},
    "difference_loss": dict.fromkeys(DIFFERENCE[:4], (3, 4)) | {"average_vector": (4,)},
}
VALID["dive_loss"] = VALID["contrastive_loss"] | {
    "reference_image_features": (2, 4),
    "reference_text_features": (2, 4),
    "image_teacher": (2, 4),
    "text_teacher": (2, 4),
    "average_vector": (4,),
}


def bad_inputs():
    """Function, argument, and the attributes that make the argument invalid."""
    for name, shapes in VALID.items():
        # Shapes are compared with the first matrix of a batch, so the first one is invalid by itself.
        for argument, shape in shapes.items():
            if argument == "average_vector":
                wrong_shapes = [(), (3,), (1, 4), (0,)]
            elif argument == "logit_scale":
                wrong_shapes = [(3,), (0,), (1, 1)]
            elif argument.endswith("image_features"):
                wrong_shapes = [(), (4,), (3, 4, 1), (0, 4), (3, 0)]
            else:
                wrong_shapes = [(), (4,), (5, 4), (1, 4), (*shape, 1), (shape[0], 3), (shape[0], 1), shape[::-1]]
            for wrong in wrong_shapes:
                yield name, argument, {"size": wrong}
            yield name, argument, {"size": shape, "dtype": torch.int64}
            if argument.endswith("text_features"):
                yield name, argument, {"size": shape, "dtype": torch.float64}
            if argument == "reference_image_features":
                yield name, argument, {"size": shape, "dtype": torch.float64}
            if argument != "image_features":
                yield name, argument, {"size": shape, "device": "meta"}


@pytest.mark.parametrize("name", VALID)
def test_valid_arguments_are_accepted(name):
    for function in getattr(naive, name), getattr(kernels, name):
        function(**{key: torch.ones(shape) for key, shape in VALID[name].items()})


@pytest.mark.parametrize(("name", "argument", "wrong"), bad_inputs())
def test_error_names_the_argument(name, argument, wrong):
    inputs = {key: torch.ones(shape) for key, shape in VALID[name].items()}
    bad = inputs | {argument: torch.ones(**wrong)}
    for function in getattr(naive, name), getattr(kernels, name):
        with pytest.raises(ValueError, match=rf"^{argument}: expected "):
            function(**bad)


def test_number_instead_of_a_tensor_is_an_error():
    features = torch.ones(4, 8)
    for package in (naive, kernels):
        with pytest.raises(
            ValueError, match=r"^logit_scale: expected a tensor, such as torch.tensor\(10.0\), got float$"
        ):
            package.contrastive_loss(features, features, 10.0)


# Invariances


sizes = {"pairs": st.integers(1, 9), "width": st.integers(1, 20), "seed": st.integers(0, 2**32 - 1)}


def losses(inputs):
    """All values of one batch in float64 by name, with the contrastive loss."""
    tensors = to_tensors(inputs)
    values = naive.difference_loss(**select(tensors, DIFFERENCE))._asdict()
    return values | {"contrastive_loss": naive.contrastive_loss(**select(tensors, CONTRASTIVE))}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@given(**sizes)
@settings(max_examples=30, deadline=None)
def test_order_of_pairs_does_not_matter(pairs, width, seed):
    inputs = make_inputs(drifted_pairs, pairs, width, seed)
    order = np.random.default_rng(seed).permutation(pairs)
    permuted = {key: array[order] if array.ndim == 2 else array for key, array in inputs.items()}
    assert_same(losses(permuted), losses(inputs))


@given(**sizes)
@settings(max_examples=30, deadline=None)
def test_length_of_features_does_not_matter(pairs, width, seed):
    inputs = make_inputs(drifted_pairs, pairs, width, seed)
    random = np.random.default_rng(seed)
    scaled = {
        key: array * 10 ** random.uniform(-5, 5, (pairs, 1)) if key.endswith("features") else array
        for key, array in inputs.items()
    }
    assert_same(losses(scaled), losses(inputs))


@given(**sizes)
@settings(max_examples=30, deadline=None)
def test_losses_are_symmetric_in_images_and_texts(pairs, width, seed):
    inputs = make_inputs(drifted_pairs, pairs, width, seed)
    other = {"image": "text", "text": "image"}
    swapped = {key: inputs["_".join(other.get(word, word) for word in key.split("_"))] for key in inputs}
    actual, expected = losses(swapped), losses(inputs)
    expected["image_norm"], expected["text_norm"] = expected["text_norm"], expected["image_norm"]
    assert_same(actual, expected)


@given(**sizes, dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_unchanged_model_has_no_difference_loss(pairs, width, seed, dtype):
    inputs = make_inputs(random_pairs, pairs, width, seed)
    image, text = (torch.tensor(inputs[key]).to(dtype) for key in CONTRASTIVE[:2])
    result = naive.difference_loss(image, text, naive.unit(image), naive.unit(text), torch.zeros(width))
    for key, value in result._asdict().items():
        assert not value.any(), key
