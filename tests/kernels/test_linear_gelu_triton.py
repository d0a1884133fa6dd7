"""GELU inside the products, against plain PyTorch in float64; see test_attention_triton.py for where it runs."""
# ruff: noqa: E402  # what the interpreter needs is set before the imports

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, and then a kernel, is imported
pytest.importorskip("triton", reason="the kernels need triton, which comes with torch for CUDA: pip install triton")

from bertforge.kernels.linear_gelu_triton import TILING, Tiling, linear_gelu, linear_gelu_backward

DEVICE = "cuda" if CUDA else "cpu"
# ||ours - exact|| / ||exact||: the rounding of the product and of the result.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
TILINGS = (
    [TILING, Tiling(64, 64, 64, 2, 4, 3, 2)]
    if CUDA
    else [Tiling(32, 32, 16, 2, 4, 2, 1), Tiling(16, 64, 32, 8, 4, 2, 2)]
)


def drawn(tokens, inner, outer, dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(tokens, inner), torch.randn(outer, inner) / inner**0.5, torch.randn(outer)
    return [part.to(DEVICE, dtype) for part in (x, weight, bias)]


def error(result, expected):
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 48), (100, 48, 80), (130, 64, 192)], ids=str)
def test_values_and_gradients_are_plain_pytorchs(shape, dtype, tiling):
    x, weight, bias = drawn(*shape, dtype)
    after, grad = (
        drawn(shape[0], shape[2], 32, dtype)[1],
        drawn(shape[0], 32, 16, dtype)[0],
    )  # [32, outer], [tokens, 32]
    before = F.linear(x.double(), weight.double(), bias.double()).requires_grad_()
    expected = F.gelu(before)
    (expected_grad,) = torch.autograd.grad(expected, before, grad.double() @ after.double())
    output, slope = linear_gelu(x, weight, bias, keep=True, tiling=tiling)
    assert output.dtype == dtype
    assert error(output, expected) < TOLERANCES[dtype]
    ours, sums = linear_gelu_backward(grad, after, slope, sums=True, tiling=tiling)
    assert error(ours, expected_grad) < 3e-3 + TOLERANCES[dtype]
    assert error(sums, expected_grad.sum(0)) < 3e-3 + TOLERANCES[dtype]
    assert torch.equal(linear_gelu_backward(grad, after, slope, sums=False, tiling=tiling)[0], ours)
    forgotten, nothing = linear_gelu(x, weight, bias, keep=False, tiling=tiling)
    assert torch.equal(forgotten, output)
    assert nothing is None


def test_gelu_and_its_slope_over_their_whole_range():
    x = torch.linspace(-8, 8, 4096, device=DEVICE)[:, None].repeat(1, 16)
    weight, bias = torch.eye(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    tiling = Tiling(64, 32, 16, 2, 4, 2, 1)
    dtype = DTYPES[0]
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    exact = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(exact).sum(), exact)
    output, code = linear_gelu(x, weight, bias, keep=True, tiling=tiling)
    assert (output.double() - F.gelu(exact)).abs().max() < 8 * TOLERANCES[dtype]
    ones = torch.ones(4096, 16, device=DEVICE, dtype=dtype)
    ours = linear_gelu_backward(ones, weight, code, sums=False, tiling=tiling)[0].double()
    assert (ours - slope).abs().max() < 0.0025 + TOLERANCES[dtype]
    assert slope.min() < -0.128
    assert slope.max() > 1.128
    assert not ours[0].any(), "far below zero nothing passes"


def test_two_runs_are_equal_bit_for_bit():
    x, weight, bias = drawn(100, 48, 80, DTYPES[0])
    first, then = (linear_gelu(x, weight, bias, keep=True, tiling=TILINGS[1]) for _ in range(2))
    assert torch.equal(first[0], then[0])
    assert torch.equal(first[1], then[1])
