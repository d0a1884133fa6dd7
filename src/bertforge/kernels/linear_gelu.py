"""GELU(x weight' + bias), the feed-forward's first half, in PyTorch: what linear_gelu_triton.py is as one kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """GELU(x weight' + bias) `[tokens, out]`, and what GELU read for `linear_gelu_backward`, None unless `keep`."""
    raw = F.linear(x, weight, bias)  # [tokens, out]
    return F.gelu(raw), raw if keep else None


def linear_gelu_backward(grad: Tensor, weight: Tensor, raw: Tensor, *, sums: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient before GELU `[tokens, intermediate]`, and with `sums` that of `linear_gelu`'s bias, float32.

    `grad` is that of the layer after GELU, `[tokens, out]`, and `weight` that layer's, `[out, intermediate]`.
    """
    raw_grad: Tensor = torch.ops.aten.gelu_backward(grad @ weight, raw)
    return raw_grad, raw_grad.sum(0, dtype=torch.float32) if sums else None
