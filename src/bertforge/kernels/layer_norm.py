"""LayerNorm(residual + dropout(x)), how both halves of a BERT layer end, in PyTorch; layer_norm_triton.py is the same
as one kernel.

torch's own dropout draws a number at a time on a CPU, 5 ns a value, a tenth of a training step; here 64 random bits of
its generator decide on four values, in a fifth of the time. A CPU has no e4m3: `fp8` and `addend` are the kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """What a LayerNorm of `hidden` columns is made of, and the dropout before it."""

    weight: Tensor
    """[hidden]."""
    bias: Tensor
    """[hidden]."""
    eps: float
    dropout_p: float
    """0 for none."""
    seed: Tensor
    """[1] int32, on the device, so that a CUDA graph draws anew at each replay; not read without dropout, nor here."""
    trained: bool
    """Weight and bias get gradients, or the bias of the layer that made x."""


@dataclass(frozen=True)
class Sums:
    """Gradients that are sums over tokens, `[hidden]` float32; None where the norm is not trained."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    x: Tensor | None = None
    """Of a bias added to x."""


def residual_layer_norm(
    x: Tensor, residual: Tensor, norm: Norm, *, fp8: None = None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """LayerNorm(residual + dropout(x)), shaped and typed as `x` `[tokens, hidden]`, and what backward needs of it."""
    mask = _kept(x, norm.dropout_p) if norm.dropout_p else None
    summed = residual + x if mask is None else torch.addcmul(residual, x, mask, value=1 / (1 - norm.dropout_p))
    # Weights in float32 have torch keep mean and 1 / deviation in float32.
    output, mean, scale = torch.native_layer_norm(summed, x.shape[1:], norm.weight.float(), norm.bias.float(), norm.eps)
    return output, (mask, summed, mean, scale)


def residual_layer_norm_backward(
    grad: Tensor, output: Tensor, kept: tuple[Tensor | None, ...], norm: Norm, *, addend: None = None, fp8: None = None
) -> tuple[Tensor, Tensor, Sums]:
    """Gradients of `residual`, of `x`, and sums over tokens; `output` and `kept` are the forward pass's.

    Without dropout the first two are one tensor.
    """
    mask, summed, mean, scale = kept
    sum_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
        grad, summed, grad.shape[1:], mean, scale, norm.weight.float(), norm.bias.float(), [True, *[norm.trained] * 2]
    )
    x_grad = sum_grad
    if mask is not None:
        x_grad = torch.addcmul(grad.new_zeros(()), sum_grad, mask, value=1 / (1 - norm.dropout_p))
    sums = Sums(weight_grad, bias_grad, x_grad.sum(0, dtype=torch.float32)) if norm.trained else Sums()
    return sum_grad, x_grad, sums


def _kept(like: Tensor, dropout_p: float) -> Tensor:
    """1 where dropout leaves a value, 0 elsewhere; its share is met to 2^-17."""
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    parts = bits.view(torch.int16)[: like.numel()].view(like.shape)  # even over -2^15 to 2^15 - 1
    return torch.ge(parts, round(dropout_p * 2**16) - 2**15, out=torch.empty_like(like))
