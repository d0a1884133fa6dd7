"""LayerNorm(residual + dropout(x)) in float64, and how far from it a kernel may be."""

import torch
import torch.nn.functional as F


def exact(x, residual, grad, norm, mask=1.0):
    """The result, gradients of residual, x, weight and bias, and of a bias added to x; `mask` is dropout's, scaled."""
    inputs = [part.detach().double().requires_grad_() for part in (residual, x, norm.weight, norm.bias)]
    output = F.layer_norm(inputs[0] + inputs[1] * mask, norm.weight.shape, inputs[2], inputs[3], norm.eps)
    gradients = torch.autograd.grad(output, inputs, grad.double())
    return [output, *gradients, gradients[1].sum(0)]


def check(results, expected, tolerance):
    """The largest difference, relative to the largest entry; what was not asked for is None."""
    for result, other in zip(results, expected, strict=True):
        if result is not None:
            assert result.shape == other.shape
            assert (result.double() - other).abs().max() < tolerance * other.abs().max()
