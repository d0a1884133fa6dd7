"""The fused LayerNorm of a sum against plain PyTorch in float64; see test_attention_triton.py for where it runs."""
# ruff: noqa: E402  # what the interpreter needs is set before the imports

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, and then a kernel, is imported
pytest.importorskip("triton", reason="the kernels need triton, which comes with torch for CUDA: pip install triton")

from bertforge.kernels.layer_norm_triton import Tiling, backward, forward, fused_layer_norm

DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-12  # BERT's
# Largest difference relative to the largest entry: a rounding of the result, half of 2^-7 or 2^-10, and float32's own.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def drawn(rows, width, dtype, residual_dtype=None):
    """x, residual, weight, bias and the result's gradient."""
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(rows, width, device=DEVICE) for _ in range(3))
    weight, bias = 1 + torch.randn(width, device=DEVICE) / 4, torch.randn(width, device=DEVICE)
    return (x + 3).to(dtype), residual.to(residual_dtype or dtype), weight, bias, grad.to(dtype)


def exact(x, residual, weight, bias, grad):
    inputs = [part.detach().double().requires_grad_() for part in (x, residual, weight, bias)]
    output = F.layer_norm(inputs[0] + inputs[1], inputs[2].shape, inputs[2], inputs[3], EPS)
    return [output, *torch.autograd.grad(output, inputs, grad.double())]


def ours(x, residual, weight, bias, grad):
    inputs = [part.detach().clone().requires_grad_() for part in (x, residual, weight, bias)]
    output = fused_layer_norm(*inputs, EPS)
    return [output, *torch.autograd.grad(output, inputs, grad)]


def check(results, expected, dtype):
    for result, other in zip(results, expected, strict=True):
        assert result.shape == other.shape
        assert (result.double() - other).abs().max() < TOLERANCES[dtype] * other.abs().max()


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 384), (9, 768), (4, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients_are_plain_pytorchs(rows, width, dtype):
    parts = drawn(rows, width, dtype)
    results = ours(*parts)
    assert [result.dtype for result in results] == [dtype, dtype, dtype, torch.float32, torch.float32]
    check(results, exact(*parts), dtype)


def test_a_float32_residual_gets_a_float32_gradient():
    parts = drawn(5, 48, torch.float16, torch.float32)
    results = ours(*parts)
    assert results[2].dtype == torch.float32
    check(results, exact(*parts), torch.float16)


def test_the_sum_counts_and_not_x_alone():
    x, residual, weight, bias, _ = drawn(3, 16, torch.float32)
    assert not torch.allclose(forward(x, residual, weight, bias, EPS), forward(x, -residual, weight, bias, EPS), 0.1)


@pytest.mark.parametrize("tiling", [Tiling(1, 1), Tiling(2, 4), Tiling(8, 8)], ids=str)
def test_programs_walk_over_more_rows_than_they_hold(tiling, monkeypatch):
    monkeypatch.setattr("bertforge.kernels.layer_norm_triton.PROGRAMS", 2)
    x, residual, weight, bias, grad = parts = drawn(37, 48, torch.float32)
    output = forward(x, residual, weight, bias, EPS, tiling)
    input_grad, *own = backward(grad, (x, residual, weight), EPS, True, tiling)
    check([output, input_grad, input_grad, *own], exact(*parts), torch.float32)


def test_two_runs_are_equal_bit_for_bit():
    parts = drawn(37, 48, torch.float32)
    for first, then in zip(ours(*parts), ours(*parts), strict=True):
        assert torch.equal(first, then)


def test_a_frozen_norm_gets_no_gradient_and_its_input_the_same_one():
    x, residual, weight, bias, grad = drawn(5, 48, torch.float32)
    expected = ours(x, residual, weight, bias, grad)[1]
    x.requires_grad_()
    fused_layer_norm(x, residual, weight, bias, EPS).backward(grad)
    assert weight.grad is None
    assert torch.equal(x.grad, expected)


def test_the_operator_keeps_its_promises_to_autograd_and_torch_compile():
    *inputs, _ = drawn(5, 48, torch.float32)
    for trained in (True, False):
        for part in inputs:
            part.requires_grad_(trained or part is inputs[0])
        torch.library.opcheck(fused_layer_norm, (*inputs, EPS), atol=1e-5, rtol=1e-5)
