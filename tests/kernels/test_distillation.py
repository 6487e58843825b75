"""The distillation losses in Triton: against float64, memory, order of programs, PyTorch's compiler."""

import contextlib

import numpy as np
import pytest
import torch
from inputs import (
    DISTILLATION,
    confident_pairs,
    drifted_pairs,
    duplicated_pairs,
    evaluate,
    make_inputs,
    opposed_pairs,
    outlying_pairs,
    random_pairs,
    select,
    vanishing_pairs,
)
from test_triton import (
    DEVICE,
    SLOW,
    GuardedBuffers,
    assert_at_most_twice_the_error,
    checked_addresses,
    count_launches,
    inputs_of,
    record_allocations,
    run,
    shuffle_programs,
    tensor_core_sums,
    tensors_of,
)

import dive_fast.kernels as kernels
from dive_fast.kernels import distillation, naive, primitives

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)

NAME = "distillation_loss"
ALL = {"feature_weight": 20.0, "relational_weight": 1.0, "interactive_weight": 0.5, "cross_weight": 2.0}
CAROT = {"relational_weight": 1.0}
# Each subset of terms reads other products.
SUBSETS = [{name: ALL[name]} for name in ALL] + [
    {name: weight for name, weight in ALL.items() if name != missing} for missing in ALL
]
FP64 = torch.float64 if primitives.INTERPRETED else torch.float32


@pytest.fixture(autouse=True)
def large_row_blocks(request, monkeypatch):
    """Sixteen times as many rows in a program of the row kernels, which the interpreter runs one by one."""
    if primitives.INTERPRETED and request.node.originalname != "test_error_at_widths_of_real_models":
        monkeypatch.setattr(primitives, "_ELEMENTS", 16 * primitives._ELEMENTS)
    distillation.geometry.cache_clear()
    yield
    distillation.geometry.cache_clear()


def arguments(kind, pairs, width, scale=1 / 0.07, seed=0):
    return inputs_of(NAME, kind, pairs, width, seed, scale)


# Against float64


@pytest.mark.parametrize(
    ("kind", "pairs", "width", "scale", "dtype"),
    [
        (random_pairs, 1, 16, 100.0, torch.float32),
        (vanishing_pairs, 5, 17, 14.3, torch.bfloat16),
        (duplicated_pairs, 31, 64, 1.0, torch.float16),
        (confident_pairs, 33, 30, 100.0, torch.float32),
        (drifted_pairs, 70, 130, 14.3, torch.float16),
        (outlying_pairs, 65, 20, 14.3, FP64),
        *(
            pytest.param(kind, pairs, width, scale, dtype, marks=SLOW)
            for kind, scale in zip(
                (random_pairs, drifted_pairs, duplicated_pairs, opposed_pairs, outlying_pairs, confident_pairs),
                (1.0, 100.0, 14.3, 100.0, 1.0, 14.3),
            )
            for pairs, width in ((2, 17), (70, 130), (130, 48))
            for dtype in (torch.float16, torch.bfloat16, torch.float32, FP64)
        ),
    ],
)
def test_error_at_most_twice_pytorchs(kind, pairs, width, scale, dtype):
    assert_at_most_twice_the_error(NAME, arguments(kind, pairs, width, scale), dtype, **ALL)


@pytest.mark.parametrize("weights", SUBSETS, ids="-".join)
def test_terms_of_weight_zero_are_left_out(weights, monkeypatch):
    """Their values are 0, and of all products only those that another term needs are computed."""
    flags = []
    launch = primitives.launch

    def recorded(kernel, programs, *tensors, **options):
        flags.append(options.get("TERMS"))
        launch(kernel, programs, *tensors, **options)

    monkeypatch.setattr(primitives, "launch", recorded)
    assert_at_most_twice_the_error(NAME, arguments(drifted_pairs, 9, 16), torch.float32, **weights)
    terms = flags[-1]
    has_relational, has_cross = ("relational_weight" in weights), ("cross_weight" in weights)
    has_teacher, is_mixed = has_relational or has_cross, has_cross or "interactive_weight" in weights
    needed = has_relational, has_teacher, is_mixed
    assert needed == (terms.RELATIONAL, terms.TEACHER, terms.MIXED)
    logits, sums = has_relational + has_teacher + is_mixed, has_relational + is_mixed
    expected = 2 * logits, 2 * (logits + sums)
    assert distillation.products(terms) == expected
    if list(weights) == ["feature_weight"]:
        assert len(flags) == 3  # rows, sum, gradient


@pytest.mark.parametrize("width", [768, *(pytest.param(width, marks=SLOW) for width in (512, 1023, 1280))])
def test_error_at_widths_of_real_models(width):
    assert_at_most_twice_the_error(NAME, arguments(drifted_pairs, 5, width), torch.float16, **ALL)


def test_many_splits_and_chunks(monkeypatch):
    """Several splits of the columns, and the gradient's weights of 128 rows at a time, the last ones partial."""
    settings = distillation.Settings(chunk_weights=0, chunk_rows=128)
    monkeypatch.setattr(distillation, "SETTINGS", settings)
    inputs = arguments(drifted_pairs, 130, 20, 100.0)
    shape = distillation.shape_of(torch.empty(130, 20), distillation.terms_of(*ALL.values()), "")
    assert distillation.geometry(shape, distillation.terms_of(*ALL.values()), True, settings).num_splits > 2
    assert_at_most_twice_the_error(NAME, inputs, torch.float32, **ALL)


def close_models(drift, pairs=20, width=64, scale=100.0):
    """A student whose unit rows differ from the teacher's by vectors of length ``drift``."""
    inputs = select(make_inputs(random_pairs, pairs, width), DISTILLATION)
    random = np.random.default_rng(1)
    for half in ("image", "text"):
        noise = random.standard_normal((pairs, width)) / width**0.5
        inputs[f"{half}_features"] = inputs[f"{half}_teacher"] + drift * noise
    return inputs | {"logit_scale": np.array(scale), "teacher_scale": np.array(scale)}


def test_equal_models_have_no_divergence_and_no_gradient():
    """Rows of the same bits, as far as normalization leaves them alone: axes, some of them shared."""
    axes = torch.eye(16)[torch.arange(40) % 16].to(DEVICE)
    scale = torch.tensor(100.0, device=DEVICE)
    tensors = [axes.clone().requires_grad_(), (0.6 * axes + 0.8 * axes.roll(1, 1)).requires_grad_()]
    teachers = axes, naive.unit(tensors[1].detach())
    assert torch.equal(naive.unit(tensors[1].detach()), tensors[1])
    scale_leaf = scale.clone().requires_grad_()
    weights = ALL | {"interactive_weight": 0.0}
    result = kernels.distillation_loss(*tensors, scale_leaf, *teachers, scale, **weights, backend="triton")
    result.loss.backward()
    assert result.loss == result.feature_loss == result.relational_loss == result.cross_loss == 0
    assert result.teacher_entropy > 0
    assert not any(tensor.grad.any() for tensor in (*tensors, scale_leaf))


@pytest.mark.parametrize("drift", [0.0, 1e-4])
def test_close_models_have_accurate_divergences(drift):
    """Divergences of 1e-5 and below at a scale of 100, where the logits' rounding alone is 1e-5."""
    for is_truncated in (False, True) if primitives.INTERPRETED else (False,):
        tensors = tensors_of(close_models(drift), torch.float32)
        exact = kernels.distillation_loss(
            **{key: tensor.detach().double() for key, tensor in tensors.items()}, **ALL, backend="torch"
        )
        with tensor_core_sums() if is_truncated else contextlib.nullcontext():
            values, _ = run(NAME, tensors, **ALL, backend="triton")
        for key in ("relational_loss", "cross_loss"):
            assert abs(values[key] - getattr(exact, key).cpu()) < 3e-8, (is_truncated, key)


@pytest.mark.skipif(not primitives.INTERPRETED, reason="fp64 runs under the interpreter only")
def test_gradcheck():
    tensors = tensors_of(arguments(random_pairs, 3, 3, 3.0), torch.float64)
    leaves = [key for key, tensor in tensors.items() if tensor.requires_grad]
    assert leaves == ["image_features", "text_features", "logit_scale"]

    def loss(*values):
        return kernels.distillation_loss(**tensors | dict(zip(leaves, values)), **ALL, backend="triton").loss

    assert torch.autograd.gradcheck(loss, [tensors[key] for key in leaves], fast_mode=True)


# Memory, order of programs, launches


@pytest.mark.parametrize(("pairs", "width", "weights"), [(1, 1, ALL), (65, 70, ALL), (5, 16, SUBSETS[0])])
def test_no_access_outside_of_buffers(pairs, width, weights, monkeypatch):
    """Memory full of NaN gives the same bits, and what surrounds it does not change."""
    tensors = tensors_of(arguments(drifted_pairs, pairs, width), torch.float16)
    expected = run(NAME, tensors, **weights, backend="triton")
    guard, aligned = GuardedBuffers(), primitives.aligned
    monkeypatch.setattr(primitives, "empty", guard)
    monkeypatch.setattr(primitives, "aligned", lambda sizes: tuple(size + 64 for size in aligned(sizes)))
    distillation.geometry.cache_clear()
    guarded = {
        key: guard.surround(tensor.detach()).requires_grad_(tensor.requires_grad)
        for key, tensor in tensors.items()
    }
    values, gradients = evaluate(kernels.distillation_loss, guarded, **weights, backend="triton")
    guard.assert_intact()
    terms = distillation.terms_of(*(weights.get(name, 0.0) for name in ALL))
    shape = distillation.shape_of(tensors["image_features"], terms, "")
    sizes = distillation.geometry(shape, terms, True, distillation.SETTINGS).state_sizes
    (state,) = (buffer for buffer, count in guard.buffers if count == sum(sizes))
    for end in guard.BAND + np.cumsum(sizes):
        assert state[end - 64 : end].isnan().all()
    for one, other in (expected[0], values), (expected[1], gradients):
        for key, value in one.items():
            assert torch.equal(other[key].cpu(), value), key


@pytest.mark.skipif(not primitives.INTERPRETED, reason="only the interpreter exposes addresses and the order")
def test_order_of_programs_does_not_matter(monkeypatch):
    """Nor does any program read or write outside of the launch's tensors, even for values that it does not use."""
    tensors = tensors_of(arguments(drifted_pairs, 70, 16), torch.float16)
    expected = run(NAME, tensors, **ALL, backend="triton")
    orders = shuffle_programs(monkeypatch)
    with checked_addresses():
        actual = run(NAME, tensors, **ALL, backend="triton")
    assert any(list(order) != sorted(order) for order in orders.values())
    for one, other in zip(expected, actual):
        for key in one:
            assert torch.equal(one[key], other[key]), key


def test_layout_of_inputs_does_not_matter():
    tensors = tensors_of(arguments(drifted_pairs, 5, 33), torch.float16)
    expected = run(NAME, tensors, **ALL, backend="triton")
    rearranged = dict(tensors)
    for key in ("image_features", "text_teacher"):
        tensor = tensors[key].detach()
        rearranged[key] = tensor.T.contiguous().T.requires_grad_(tensors[key].requires_grad)
    text = tensors["text_features"].detach()
    shifted = torch.cat([text.new_zeros(1), text.flatten()])[1:].view(text.shape)
    values, gradients = evaluate(
        kernels.distillation_loss,
        rearranged | {"text_features": shifted.requires_grad_()},
        **ALL,
        backend="triton",
    )
    assert all(torch.equal(values[key].cpu(), value) for key, value in expected[0].items())
    assert all(torch.equal(gradients[key].cpu(), value) for key, value in expected[1].items())


@pytest.mark.parametrize(
    ("weights", "forward", "backward", "operators"),
    [(ALL, 2, 2, ["aten.bmm.out"]), (CAROT, 2, 2, ["aten.bmm.out"]), (SUBSETS[0], 2, 1, [])],
)
def test_number_of_launches(weights, forward, backward, operators, monkeypatch):
    tensors = tensors_of(arguments(drifted_pairs, 20, 48), torch.float16)
    values = [tensors[key].detach() for key in DISTILLATION]
    weights = [weights.get(name, 0.0) for name in ALL]
    launches, names, (_, _, *saved) = count_launches(
        monkeypatch, lambda: distillation.launch_forward(*values, *weights, "")
    )
    assert (launches, names) == (forward, [])
    sizes = 20, 20, 0, 48, True, torch.float16
    upstream, scales = torch.ones((), device=DEVICE), (values[2], values[5])
    launches, names, _ = count_launches(
        monkeypatch, lambda: distillation.launch_backward(upstream, *scales, *saved, *sizes, *weights)
    )
    assert (launches, names) == (backward, operators)


@pytest.mark.parametrize("pairs", [512, 8192, 65_536])
def test_extra_memory_is_linear_in_the_batch(pairs, monkeypatch):
    """Counts all allocations of a step on meta tensors, at sizes whose B x B matrix would fill a GPU."""
    allocated = record_allocations(monkeypatch)
    features = torch.empty(pairs, 768, dtype=torch.float16, device="meta")
    teacher, scale = features.float(), torch.empty((), device="meta")
    _, _, *saved = distillation.launch_forward(
        features, features, scale, teacher, teacher, scale, *ALL.values(), ""
    )
    forward_bytes = sum(allocated)
    sizes = pairs, pairs, 0, 768, True, torch.float16
    distillation.launch_backward(scale, scale, scale, *saved, *sizes, *ALL.values())
    assert forward_bytes < 4.1 * teacher.nbytes + 1500 * pairs
    terms = distillation.terms_of(*ALL.values())
    chunk, columns = distillation.chunk_size(
        distillation.shape_of(features, terms, ""), terms, distillation.SETTINGS
    )
    assert 2 * chunk * columns <= max(distillation.SETTINGS.chunk_weights, 2 * 256 * columns)
    scratch = 4 * 2 * chunk * (columns + 768)
    assert sum(allocated) - forward_bytes == 2 * features.nbytes + scale.nbytes + scratch


# Not a number


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, float("inf")), (torch.bfloat16, float("-inf")), (torch.float32, float("nan"))],
    ids=str,
)
@pytest.mark.parametrize("weights", [ALL, SUBSETS[0]], ids=["all", "feature"])
def test_nonfinite_feature_reaches_loss_and_gradients(weights, dtype, value):
    """Steps are skipped because of their gradients, so a bad feature must reach the loss and the gradients."""
    argument = "text_features" if dtype == torch.float16 else "image_features"
    tensors = tensors_of(arguments(random_pairs, 9, 20), dtype)
    tensors[argument].detach()[2, 7] = value
    values, gradients = run(NAME, tensors, **weights, backend="triton")
    assert not values["loss"].isfinite()
    assert not gradients[argument].isfinite().all()


@pytest.mark.parametrize("argument", ["logit_scale", "teacher_scale", "image_teacher"])
def test_nonfinite_constant_reaches_loss_and_gradients(argument):
    tensors = tensors_of(arguments(confident_pairs, 5, 20), torch.float32)
    tensors[argument].detach().view(-1)[0] = float("inf")
    values, gradients = run(NAME, tensors, **ALL, backend="triton")
    assert not values["loss"].isfinite()
    assert not any(gradient.isfinite().all() for gradient in gradients.values())


# PyTorch's compiler


def test_operators_for_the_compiler(monkeypatch):
    # Opcheck compares all results of two calls, also the elements between the state's buffers that nothing writes.
    monkeypatch.setattr(primitives, "empty", lambda *shape, **kind: torch.zeros(shape, **kind))
    tensors = tensors_of(arguments(drifted_pairs, 5, 16), torch.float32)
    values, weights = [tensors[key] for key in DISTILLATION], [0.0, 1.0, 0.0, 0.0]
    torch.library.opcheck(distillation.forward, (*values, *weights, ""))
    with torch.no_grad():
        _, _, *saved = distillation.launch_forward(*values, *weights, "")
    sizes = 5, 5, 0, 16, True, torch.float32
    upstream, scales = torch.tensor(3.0, device=DEVICE), (values[2].detach(), values[5])
    torch.library.opcheck(distillation.backward, (upstream, *scales, *saved, *sizes, *weights))


def test_fake_tensors_have_the_real_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = tensors_of(arguments(drifted_pairs, 5, 16), torch.float16)
    results = run(NAME, real, **ALL, backend="triton")
    mode = FakeTensorMode()
    fake = {
        key: mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad) for key, tensor in real.items()
    }
    with mode:
        fake_results = evaluate(kernels.distillation_loss, fake, **ALL, backend="triton")
    for one, other in zip(results, fake_results):
        for key, tensor in one.items():
            assert (tensor.shape, tensor.dtype) == (other[key].shape, other[key].dtype), key


def test_second_derivative_is_an_error_and_not_a_constant():
    tensors = tensors_of(arguments(random_pairs, 3, 16), torch.float32)
    tensors["logit_scale"].requires_grad_(False)
    loss = kernels.distillation_loss(**tensors, **CAROT, backend="triton").loss
    (gradient,) = torch.autograd.grad(loss, tensors["text_features"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (loss + gradient.square().sum()).backward()


def test_teacher_gets_no_gradient_and_only_the_loss_has_one():
    tensors = tensors_of(arguments(random_pairs, 3, 16), torch.float32)
    for key in ("image_teacher", "text_teacher", "teacher_scale"):
        tensors[key].requires_grad_()
    for choice in ("triton", "torch"):
        result = kernels.distillation_loss(**tensors, **CAROT, backend=choice)
        assert [name for name, value in result._asdict().items() if value.requires_grad] == ["loss"]
        result.loss.backward()
    assert tensors["image_teacher"].grad is None
    assert tensors["teacher_scale"].grad is None


def test_scale_of_the_teacher_is_named_in_its_error():
    tensors = tensors_of(arguments(random_pairs, 3, 16), torch.float32)
    tensors["teacher_scale"] = torch.ones(2, device=DEVICE)
    for choice in ("triton", "torch"):
        with pytest.raises(ValueError, match=r"^teacher_scale: expected shape \(\) or \(1,\), got \(2,\)$"):
            kernels.distillation_loss(**tensors, **CAROT, backend=choice)
