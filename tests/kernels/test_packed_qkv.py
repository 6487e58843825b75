"""Packed queries, keys and values: views forward, one exact copy with its column sums backward."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_cases import DEVICE, DTYPES, normal, parameter_dtype, rows_of
from test_triton import count_launches

import dive_fast.kernels as kernels
from dive_fast.kernels import naive, packed_qkv, primitives

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)


def transposed(gradients):
    """``(B, N, H, d)`` contiguous, as from flash attention."""
    return [gradient.transpose(1, 2).contiguous().transpose(1, 2) for gradient in gradients]


def packed(gradients):
    """Views of one packed tensor, as from memory-efficient attention."""
    return list(torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2).transpose(1, 3).unbind(2))


def column_major(gradients):
    return [gradient.mT.contiguous().mT for gradient in gradients]


def mixed(gradients):
    first, *others = gradients
    return [*transposed([first]), *others]


def misaligned(gradients):
    buffers = [torch.cat([g.new_zeros(1), g.transpose(1, 2).flatten()])[1:] for g in gradients]
    return [
        b.view(g.shape[0], g.shape[2], g.shape[1], g.shape[3]).transpose(1, 2) for b, g in zip(buffers, gradients)
    ]


LAYOUTS = [list, transposed, packed, column_major, mixed, misaligned]


def split(qkv, bias, heads, parts, backend):
    return kernels.split_qkv(qkv, bias, heads, backend, parts=parts)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("programs", [1, 4096])
def test_gradient_is_packed_exactly(layout, parts, programs, monkeypatch):
    monkeypatch.setattr(packed_qkv, "_MAX_PROGRAMS", programs)
    for dtype, (batch, length, heads, width) in zip(
        DTYPES, [(2, 9, 3, 8), (1, 1, 1, 1), (3, 5, 2, 7), (2, 3, 2, 129)]
    ):
        qkv = normal(0, batch, length, parts * heads * width, dtype=dtype)
        bias = normal(1, parts * heads * width, dtype=parameter_dtype(dtype))
        outputs = split(qkv, bias, heads, parts, "triton")
        gradients = layout(
            [normal(5 + k, *output.shape, dtype=dtype).detach() for k, output in enumerate(outputs)]
        )
        dqkv, dbias = torch.autograd.grad(outputs, (qkv, bias), gradients)
        expected = torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2).view_as(qkv)
        assert torch.equal(dqkv, expected)
        assert dqkv.is_contiguous()
        assert dbias.dtype == bias.dtype
        exact, rounding = rows_of(expected).sum(0), torch.finfo(bias.dtype).eps
        assert np.abs(rows_of(dbias) - exact).max() <= 4 * rounding * np.abs(rows_of(expected)).sum(0).max()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_outputs_are_views_of_the_product(backend):
    qkv = normal(0, 2, 5, 3 * 4 * 6, dtype=torch.float16)
    bias = normal(1, 72, dtype=torch.float32)
    for outputs in split(qkv, bias, 4, 3, backend), split(qkv[..., 24:], bias[24:], 4, 2, backend):
        assert all(output.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for output in outputs)
    q, k, v = split(qkv, None, 4, 3, backend)
    assert [tuple(x.shape) for x in (q, k, v)] == [(2, 4, 5, 6)] * 3
    assert torch.equal(v[1, 2, 3], qkv[1, 3, 2 * 24 + 2 * 6 : 2 * 24 + 3 * 6])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("used", [(0,), (1, 2), ()])
def test_unused_outputs_have_zero_gradient(used, backend):
    qkv, bias = normal(0, 2, 5, 36, dtype=torch.float32), normal(1, 36, dtype=torch.float32)
    outputs = split(qkv, bias, 2, 3, backend)
    if used:
        loss = sum(outputs[index].sum() for index in used)
        dqkv, dbias = torch.autograd.grad(loss, (qkv, bias))
        expected = torch.zeros(3, 12, device=DEVICE)
        expected[list(used)] = 1.0
        assert torch.equal(dqkv, expected.flatten().expand(2, 5, 36))
        assert torch.equal(dbias, 10 * expected.flatten())


def test_query_of_one_token_attends_to_all(monkeypatch):
    """The last block splits keys and values alone; its bias is part of a longer one."""
    torch.manual_seed(0)
    kv, bias = normal(0, 2, 5, 32, dtype=torch.float64), normal(1, 48, dtype=torch.float64)
    query = normal(2, 2, 2, 1, 8, dtype=torch.float64)
    results = []
    for backend in ("triton", "torch"):
        product = kv + bias[16:].detach()
        k, v = split(product, bias[16:], 2, 2, backend)
        output = F.scaled_dot_product_attention(query, k, v)
        results.append((output, *torch.autograd.grad(output.square().sum(), (kv, bias, query))))
    for triton, plain in zip(*results):
        torch.testing.assert_close(triton, plain)


@pytest.mark.skipif(not primitives.INTERPRETED, reason="fp64 runs under the interpreter only")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gradcheck(backend):
    """The product has the bias already, so it is added outside, without a gradient."""
    tensors = normal(0, 1, 2, 12, dtype=torch.float64), normal(1, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, bias: split(x + bias.detach(), bias, 2, 3, backend), tensors)


def test_number_of_launches(monkeypatch):
    """None forward; one backward, and one for the sums of a bias that requires a gradient."""
    qkv, bias = normal(0, 2, 5, 36, dtype=torch.float16), normal(1, 36, dtype=torch.float32)
    upstream = torch.stack(transposed([torch.ones(2, 2, 5, 6, dtype=torch.float16, device=DEVICE)] * 3)).unbind()
    for tensors, expected in ((qkv, bias), 2), ((qkv, bias.detach()), 1), ((qkv, None), 1):
        leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

        def step(tensors=tensors, leaves=leaves):
            return torch.autograd.grad(split(*tensors, 2, 3, "triton"), leaves, upstream)

        launches, operations, _ = count_launches(monkeypatch, step)
        assert launches == expected
        assert operations == ["dive_fast.split_qkv_backward.default"]


def test_plain_pytorch_gives_the_bias_the_sums_of_the_gradient():
    qkv, bias = normal(0, 2, 5, 36, dtype=torch.float16), normal(1, 36, dtype=torch.float32)
    gradients = [normal(5 + k, 2, 2, 5, 6, dtype=torch.float16).detach() for k in range(3)]
    dqkv, dbias = torch.autograd.grad(naive.split_qkv(qkv, bias, 2), (qkv, bias), gradients)
    np.testing.assert_allclose(rows_of(dbias), rows_of(dqkv).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "parts", "message"),
    [
        ((torch.ones(2, 12), None, 2), 3, r"qkv: expected shape \(B, N, 3 \* 2 \* width\), got \(2, 12\)"),
        ((torch.ones(1, 2, 12), None, 5), 3, r"expected shape \(B, N, 3 \* 5 \* width\)"),
        ((torch.ones(1, 2, 12), None, 0), 3, r"expected shape \(B, N, 3 \* 0 \* width\)"),
        ((torch.ones(1, 2, 12), torch.ones(4), 2), 3, r"bias: expected shape \(12,\), got \(4,\)"),
        ((torch.ones(1, 2, 12), None, 2), 4, r"parts: expected 2 \(keys, values\) or 3"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bad_arguments_are_refused(arguments, parts, message, backend):
    with pytest.raises(ValueError, match=message):
        kernels.split_qkv(*arguments, backend, parts=parts)
