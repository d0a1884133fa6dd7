"""Products with frozen weights in e4m3, the 8-bit floating point whose products Hopper computes at twice bf16's rate.

e4m3 holds a number to 3 bits behind its first, 3 % at the most, from 2^-6 to 448, and to 2^-10 below. So a scale need
not be exact to a factor of some hundred, and two of the three kinds of operand need no look at their values:

- weights are frozen: one scale each, from the largest value, once;
- activations (of LayerNorm and GELU, of the order of 1) have the constant ACTIVATION_SCALE; what lies beyond 56 is cut;
- gradients span many powers of ten from token to token: each row has a scale of its own, from its largest value, where
  the kernel that makes the row holds it whole (`layer_norm_triton`); what comes out of a product by tiles has one from
  the bound on a product that `Fp8Weight.growth` is (`linear_gelu_triton`).

Whoever makes an operand writes it in 8 bits; no pass over it is spent on the conversion. Sums are those of the tensor
cores, of 14 bits ("fast accumulation"): far finer than the operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
ACTIVATION_SCALE = 8.0  # an activation is kept as 8 times itself
STEEPEST = 1.15  # GELU's slope is nowhere larger, in e4m3's neighbourhood


@dataclass(frozen=True)
class Fp8Weight:
    """A frozen linear layer's weight, for both directions: FP8 products read operands along what is summed over."""

    rows: Tensor
    """[out, in] e4m3: forward."""
    columns: Tensor
    """[in, out] e4m3, the transpose: backward."""
    scale: Tensor
    """[] float32: weight = scale * rows."""
    growth: Tensor
    """[] float32: |grad weight * slope of GELU| <= growth * the row of grad's largest value, by Cauchy-Schwarz."""
    unscale: Tensor
    """[] float32: 1 / ACTIVATION_SCALE."""

    @classmethod
    def of(cls, weight: Tensor) -> Fp8Weight:
        """`weight` `[out, in]`, in any floating type."""
        exact = weight.detach().float()
        scale = exact.abs().amax().clamp(min=1e-12) / LARGEST
        rows = (exact / scale).clamp(-LARGEST, LARGEST).to(E4M3)
        norm = (rows.float() * scale).norm(dim=0).amax()  # of a column
        return cls(
            rows,
            rows.T.contiguous(),
            scale,
            STEEPEST * weight.shape[0] ** 0.5 * norm,
            torch.full_like(scale, 1 / ACTIVATION_SCALE),
        )


@dataclass(frozen=True)
class Fp8Rows:
    """A gradient `[tokens, width]` in e4m3 with a scale for each row: scale * values."""

    values: Tensor
    """[tokens, width] e4m3."""
    scale: Tensor
    """[tokens, 1] float32."""

    @classmethod
    def empty(cls, like: Tensor) -> Fp8Rows:
        """Room for one shaped as `like`."""
        return cls(torch.empty_like(like, dtype=E4M3), like.new_empty(len(like), 1, dtype=torch.float32))


def linear(x: Tensor, weight: Fp8Weight, bias: Tensor) -> Tensor:
    """x weight' + bias `[tokens, out]`, typed as `bias`, from activations e4m3 `[tokens, in]`."""
    return torch._scaled_mm(
        x, weight.rows.T, weight.unscale, weight.scale, bias=bias, out_dtype=bias.dtype, use_fast_accum=True
    )


def linear_backward(grad: Tensor, scale: Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """scale * grad weight `[tokens, in]`, from a gradient e4m3 `[tokens, out]` and one number.

    Who reads it applies the scales of rows. cuBLAS would, but is no faster for it, and torch before 2.12 launches the
    kernel that does so on Ada outside of the current stream, and so of a CUDA graph (pytorch issue 177651).
    """
    return torch._scaled_mm(grad, weight.columns.T, scale, weight.scale, out_dtype=dtype, use_fast_accum=True)
