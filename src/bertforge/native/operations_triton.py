"""The operations of the GPU engine by Triton's kernels and cuBLAS, as `native.choices` has found them fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import triton
from torch import Tensor

from bertforge.kernels import attention_triton, inference_norm_triton, product_triton
from bertforge.kernels.attention import Bounds
from bertforge.kernels.linear_gelu_triton import Tiling
from bertforge.native.choices import Choice, Choices
from bertforge.native.network import POOLING, Written
from bertforge.native.weights import TYPES, Linear, NativeWeights, Norm


@dataclass(frozen=True)
class TritonOperations:
    """See `network.Operations`; on CUDA, or in Triton's interpreter."""

    choices: Choices
    one: Tensor
    """[] float32: the scales that `_scaled_mm` applies."""

    @classmethod
    def on(cls, device: torch.device, choices: Choices) -> Self:
        """On a GPU."""
        return cls(choices, torch.ones((), device=device))

    def types(self, form: str) -> torch.dtype:
        return TYPES[form]

    def embed(self, ids: Tensor, positions: Tensor, weights: NativeWeights, out: Written) -> None:
        norm = (weights.embedding_norm.weight, weights.embedding_norm.bias, weights.config.layer_norm_eps)
        inference_norm_triton.embed(ids, positions, weights.words, weights.places, norm, *_places(out))

    def product(self, x: Tensor, linear: Linear, out: Tensor) -> None:
        chosen = self.choices.of("product", linear, len(x))
        if chosen:
            product_triton.product(x, linear.weight, out, Tiling(*chosen))
        elif linear.form == "fp8":
            torch._scaled_mm(x, linear.weight.T, self.one, self.one, out_dtype=out.dtype, use_fast_accum=True, out=out)
        else:
            torch.mm(x, linear.weight.T, out=out)

    def activated(self, x: Tensor, linear: Linear, activation: str, after: Linear, out: Tensor) -> None:
        chosen = self.choices.of("pooled" if activation == POOLING else "activated", linear, len(x))
        assert chosen, "cuBLAS has no activation"
        tiling = Tiling(*chosen)
        product_triton.linear_activation(
            x, linear.weight, linear.scale, linear.bias, after.multiplier, out, activation, tiling
        )

    def attend(
        self, projections: tuple[Tensor, Tensor, Tensor], affine: Tensor, bounds: Bounds, after: Linear, out: Tensor
    ) -> None:
        attention_triton.infer(*projections, affine, bounds, out)

    def residual_norm(self, x: Tensor, linear: Linear, residual: Tensor, norm: Norm, eps: float, out: Written) -> None:
        own = (norm.weight, norm.bias, eps)
        inference_norm_triton.residual_norm(x, linear.scale, linear.bias, residual, own, *_places(out))


def _places(out: Written) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The residual, and multiplier and memory of the copy."""
    return out.hidden, None if out.reader is None else out.reader.multiplier, out.short


def seconds(kind: str, linear: Linear, tokens: int, choice: Choice, device: torch.device) -> float:
    """Of one product of random numbers on a GPU, computed by `choice`; infinite where it cannot be computed so."""
    own = {name: part.to(device) for name, part in vars(linear).items() if part is not None}
    linear, (out, width) = replace(linear, **own), linear.weight.shape
    x = torch.randn(tokens, width, device=device).mul(20).clamp(-100, 100).to(linear.weight.dtype)
    types = {"product": torch.bfloat16, "activated": linear.weight.dtype, "pooled": torch.float32}
    result = torch.empty(tokens, out, dtype=types[kind], device=device)
    operations = TritonOperations.on(device, Choices("", {f"{kind} {linear.form}": [choice] * 3}))
    after = Linear(
        linear.weight, linear.bias, multiplier=None if linear.scale is None else torch.ones_like(linear.bias)
    )

    def work() -> None:
        if kind == "product":
            operations.product(x, linear, result)
        else:
            operations.activated(x, linear, POOLING if kind == "pooled" else "gelu", after, result)

    try:
        found = triton.testing.do_bench(work, warmup=5, rep=20, return_mode="median")
    except (triton.CompilationError, triton.runtime.errors.OutOfResources):
        return math.inf
    return float(found) * 1e-3
