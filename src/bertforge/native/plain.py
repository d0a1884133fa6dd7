"""The operations of the GPU engine in PyTorch, computed in float32, on any device: what the kernels are held against.

With `rounding` every value is rounded where the kernels round it. Without, nothing is rounded but the weights, as they
are stored, and what a product reads in 8 bits is cut to their range: what is left must be the model itself
(`proof.structure`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bertforge.kernels.attention import Bounds, varlen_attention
from bertforge.model.encoder import ACTIVATIONS
from bertforge.native.network import POOLING, Written
from bertforge.native.weights import TYPES, Linear, NativeWeights, Norm

_ACTIVATIONS = {**ACTIVATIONS, POOLING: torch.tanh}
_RANGES = {"int8": (-128.0, 127.0), "fp8": (-448.0, 448.0)}


@dataclass(frozen=True)
class PlainOperations:
    """See `network.Operations`."""

    rounding: bool

    def types(self, form: str) -> torch.dtype:
        return TYPES[form] if self.rounding else torch.float32

    def embed(self, ids: Tensor, positions: Tensor, weights: NativeWeights, out: Written) -> None:
        summed = weights.words[ids.long()].float() + weights.places[positions.long()].float()
        _normalize(summed, weights.embedding_norm, weights.config.layer_norm_eps, out)

    def product(self, x: Tensor, linear: Linear, out: Tensor) -> None:
        out.copy_(_multiplied(x, linear))

    def activated(self, x: Tensor, linear: Linear, activation: str, after: Linear, out: Tensor) -> None:
        _write(_ACTIVATIONS[activation](_finished(_multiplied(x, linear), linear)), after, out)

    def attend(
        self, projections: tuple[Tensor, Tensor, Tensor], affine: Tensor, bounds: Bounds, after: Linear, out: Tensor
    ) -> None:
        asked, known = (int(side[-1]) for side in (bounds.queries, bounds.keys))
        query, key, value = (part.float() for part in projections)
        query = (query[:asked] * affine[0] + affine[1]).to(self.types("bf16")).float()
        found = varlen_attention(query, key[:known], value[:known], bounds, int(bounds.keys.diff().max()))
        out[:asked] = _cut(found * affine[2] + affine[3], after.form, out.dtype)  # times `after.multiplier` already

    def residual_norm(self, x: Tensor, linear: Linear, residual: Tensor, norm: Norm, eps: float, out: Written) -> None:
        _normalize(_finished(x.float(), linear) + residual.float(), norm, eps, out)


def _multiplied(x: Tensor, linear: Linear) -> Tensor:
    return x.float() @ linear.weight.float().T


def _finished(product: Tensor, linear: Linear) -> Tensor:
    return (product if linear.scale is None else product * linear.scale) + linear.bias


def _normalize(summed: Tensor, norm: Norm, eps: float, out: Written) -> None:
    values = torch.nn.functional.layer_norm(summed, norm.weight.shape, norm.weight, norm.bias, eps)
    out.hidden.copy_(values)
    if out.short is not None and out.reader is not None:
        _write(values, out.reader, out.short)


def _write(values: Tensor, after: Linear, out: Tensor) -> None:
    out.copy_(_cut(values if after.multiplier is None else values * after.multiplier, after.form, out.dtype))


def _cut(values: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """`values` in the range of a form, and rounded where `dtype` is not float32."""
    if form in _RANGES:
        values = values.clamp(*_RANGES[form])
    return (values.round() if dtype == torch.int8 else values).to(dtype)
