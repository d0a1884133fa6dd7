"""GELU(x weight' + bias) in PyTorch against autograd's in float64."""

import pytest
import torch
import torch.nn.functional as F

from bertforge.kernels.linear_gelu import linear_gelu, linear_gelu_backward


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str)
def test_values_and_gradients_are_autograds(dtype, tolerance):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((30, 16), (48, 16), (48,)))
    grad, after = torch.randn(30, 8).to(dtype), torch.randn(8, 48).to(dtype)
    before = F.linear(x.double(), weight.double(), bias.double()).requires_grad_()
    expected = F.gelu(before)
    (expected_grad,) = torch.autograd.grad(expected, before, grad.double() @ after.double())
    output, raw = linear_gelu(x, weight, bias, keep=True)
    raw_grad, sums = linear_gelu_backward(grad, after, raw, sums=True)
    assert [result.dtype for result in (output, raw_grad, sums)] == [dtype, dtype, torch.float32]
    for result, other in ((output, expected), (raw_grad, expected_grad), (sums, expected_grad.sum(0))):
        assert (result.double() - other).norm() < tolerance * other.norm()
    assert linear_gelu_backward(grad, after, raw, sums=False)[1] is None
    forgotten, nothing = linear_gelu(x, weight, bias, keep=False)
    assert torch.equal(forgotten, output)
    assert nothing is None
