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

from bertforge.kernels.fp8 import ACTIVATION_SCALE, E4M3, STEEPEST, Fp8Rows, Fp8Weight
from bertforge.kernels.linear_gelu_triton import (
    FP8_TILING,
    TILING,
    Tiling,
    linear_gelu,
    linear_gelu_backward,
    linear_gelu_fp8,
    linear_gelu_fp8_backward,
)
from tests.kernels.e4m3 import round_as_hardware_does

DEVICE = "cuda" if CUDA else "cpu"
# ||ours - exact|| / ||exact||: the rounding of the product and of the result, and GELU's fit, of values and slopes.
FIT, SLOPE_FIT = 3e-5, 1.2e-4
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
    return float((result.double() - expected.detach()).norm() / expected.detach().norm())


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
    assert error(output, expected) < FIT + TOLERANCES[dtype]
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
    assert (output.double() - F.gelu(exact)).abs().max() < FIT + 8 * TOLERANCES[dtype], "of values up to 8"
    ones = torch.ones(4096, 16, device=DEVICE, dtype=dtype)
    ours = linear_gelu_backward(ones, weight, code, sums=False, tiling=tiling)[0].double()
    # Half a step of the code, the fit, and the rounding of the result.
    assert (ours - slope).abs().max() < 0.0025 + SLOPE_FIT + TOLERANCES[dtype]
    assert slope.min() < -0.128
    assert slope.max() > 1.128
    assert not ours[0].any(), "far below zero nothing passes"


def test_two_runs_are_equal_bit_for_bit():
    x, weight, bias = drawn(100, 48, 80, DTYPES[0])
    first, then = (linear_gelu(x, weight, bias, keep=True, tiling=TILINGS[1]) for _ in range(2))
    assert torch.equal(first[0], then[0])
    assert torch.equal(first[1], then[1])


def in_fp8(shape, spread=1.0):
    """x in e4m3, weight, bias, the next layer's weight `[32, outer]`, and a gradient that differs in size by row."""
    x, weight, bias = drawn(*shape, torch.float32)
    after = drawn(1, shape[2], 32, torch.float32)[1]
    grad = drawn(shape[0], 32, 1, torch.float32)[0] * torch.logspace(-9, 0, shape[0], device=DEVICE)[:, None]
    scale = grad.abs().amax(1, keepdim=True) / 448
    short = (spread * x * ACTIVATION_SCALE).clamp(-448, 448).to(E4M3)
    return short, Fp8Weight.of(weight), bias, Fp8Weight.of(after), Fp8Rows((grad / scale).to(E4M3), scale)


def wide(short):
    """What e4m3 operands stand for, in float64."""
    if isinstance(short, Fp8Weight):
        return short.rows.double() * short.scale.double()
    return short.values.double() * short.scale if isinstance(short, Fp8Rows) else short.double() / ACTIVATION_SCALE


FP8_TILINGS = [FP8_TILING, Tiling(128, 128, 64, 8, 4, 3, 2)] if CUDA else TILINGS


@pytest.mark.parametrize("tiling", FP8_TILINGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 48), (100, 48, 80), (130, 64, 192)], ids=str)
def test_products_of_e4m3_are_exact_but_for_the_rounding_of_what_they_give(shape, tiling, monkeypatch):
    round_as_hardware_does(monkeypatch)
    x, weight, bias, after, grad = in_fp8(shape)
    before = (wide(x) @ wide(weight).T + bias.double()).requires_grad_()
    expected = F.gelu(before)
    (expected_grad,) = torch.autograd.grad(expected, before, wide(grad) @ wide(after))
    output, slope = linear_gelu_fp8(x, weight, bias, keep=True, tiling=tiling)
    assert output.dtype == E4M3
    assert error(wide(output), expected) < 0.03, "e4m3 rounds by 0.0255 on average"
    rounded = (expected * ACTIVATION_SCALE).clamp(max=448).to(E4M3).double()
    assert error(output.double(), rounded) < 3e-3, "but for ties"
    values = linear_gelu_fp8_backward(grad, after, slope, tiling)
    result = Fp8Rows(values, grad.scale * after.growth)
    assert result.values.dtype == E4M3
    for row, exact in zip(wide(result), expected_grad, strict=True):  # rows of every size alike
        assert error(row, exact) < 0.04
    assert error(result.values.double(), (expected_grad / result.scale).to(E4M3).double()) < 0.015, "but for the slope"
    forgotten, nothing = linear_gelu_fp8(x, weight, bias, keep=False, tiling=tiling)
    assert torch.equal(forgotten.view(torch.uint8), output.view(torch.uint8))
    assert nothing is None


def test_activations_beyond_e4m3_are_cut_and_gradients_never_reach_its_end(monkeypatch):
    round_as_hardware_does(monkeypatch)
    tiling = FP8_TILINGS[-1]
    x, weight, bias, *_ = in_fp8((64, 48, 80), spread=100.0)
    output, _ = linear_gelu_fp8(x, weight, bias, keep=True, tiling=tiling)
    assert output.float().max() == 448
    assert output.float().isfinite().all()
    # The worst gradient for a bound from a row's largest value: as large everywhere, its signs those of the weight.
    even = Fp8Weight.of(torch.full((32, 80), 0.3, device=DEVICE))
    rows = Fp8Rows(torch.full((64, 32), 448.0, device=DEVICE).to(E4M3), torch.ones(64, 1, device=DEVICE))
    steepest = torch.full((64, 80), 255, dtype=torch.uint8, device=DEVICE)  # a slope of 1.145
    worst = Fp8Rows(linear_gelu_fp8_backward(rows, even, steepest, tiling), rows.scale * even.growth)
    assert worst.values.float().min() > 400, "the bound is met"
    assert error(wide(worst), torch.full((64, 80), 448 * 32 * 0.3 * 1.145, device=DEVICE)) < 0.03, "and not passed"
    assert STEEPEST > 1.145
