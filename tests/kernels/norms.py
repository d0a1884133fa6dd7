"""LayerNorm(residual + dropout(x)) in float64, and how far from it a kernel may be."""

import torch
import torch.nn.functional as F

from bertforge.kernels.layer_norm import Norm


def drawn(rows, width, dtype, dropout_p=0.0, trained=True, device="cpu"):
    """x, residual, the result's gradient, and a norm."""
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(rows, width, device=device).to(dtype) for _ in range(3))
    weight, bias = 1 + torch.randn(width, device=device) / 4, torch.randn(width, device=device)
    seed = torch.tensor([7], dtype=torch.int32, device=device)
    return x + 0.5, residual, grad, Norm(weight, bias, 1e-12, dropout_p, seed, trained)  # BERT's epsilon


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


def check_plain(results, parts, tolerance):
    """What a kernel gave without dropout: plain PyTorch's values in the type of `parts`, sums only where trained."""
    x, _, _, norm = parts
    assert [result.dtype for result in results[:3]] == [x.dtype] * 3
    assert [result is None for result in results[3:]] == [not norm.trained] * 3
    check(results, exact(*parts), tolerance)
