"""LayerNorm of a sum, how both halves of a BERT layer end: in plain PyTorch, or fused (layer_norm_triton.py)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

# Whether CUDA runs the fused kernels. They give the result in `x`'s dtype; plain PyTorch under autocast gives float32.
FUSED = False


def residual_layer_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`norm(x + residual)`; `x` and `residual` are `[..., hidden]`."""
    if FUSED and x.is_cuda:
        from bertforge.kernels.layer_norm_triton import fused_layer_norm

        return cast(Tensor, fused_layer_norm(x, residual, norm.weight, norm.bias, norm.eps))
    return cast(Tensor, norm(x + residual))
