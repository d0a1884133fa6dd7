"""A BERT layer for half precision, forward and backward written out by hand over packed tokens.

It computes what the modules of `BertLayer` do. Autograd differentiates those one operator at a time: every sum of two
gradients is a pass over all hidden states, every operator keeps its inputs, and query, key and value each have products
of their own. Written out,

- query, key and value are one product forward, and one backward for the hidden states they share;
- the gradient that comes along a residual is the addend of the product that ends its branch, so no sum is a pass;
- dropout, residual and LayerNorm are one kernel, the feed-forward's first product and GELU another;
- only what the next step cannot give back is kept: the projections, the attended values, both LayerNorms' outputs and
  GELU's slopes in 8 bits, 12 KB a token at a width of 768;
- a frozen weight costs no product, and a layer whose input needs no gradient stops there.

With `queries` the layer is computed for these tokens alone, as the last layer is: a classifier reads first tokens only.

On CUDA attention, dropout with LayerNorm and the product with GELU are Triton kernels. A CPU has no launches to save,
but the same passes and casts: there they are torch's operators in bfloat16, and keep GELU's input and the softmax's
weights instead of what would be worked out again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bertforge.kernels import attention_cpu, layer_norm, linear_gelu
from bertforge.kernels.attention import Bounds
from bertforge.kernels.layer_norm import Norm

NAMES = ("query", "key", "value", "attention.output", "attention.norm", "intermediate", "output", "norm")


@dataclass(frozen=True)
class Settings:
    """What a layer is, besides its weights."""

    heads: tuple[int, int]
    """Number of heads, head_dim."""
    eps: float
    """Of both LayerNorms."""
    dropout_p: float
    """Of both residual branches; 0 in evaluation."""
    keep: bool
    """Backward will follow."""
    triton: bool
    """By Triton's kernels; else by torch's, on a CPU."""


def fused_layer(
    hidden: Tensor, queries: Tensor | None, bounds: Bounds, settings: Settings, weights: tuple[Tensor, ...]
) -> Tensor:
    """`hidden` `[tokens, hidden]` -> `[tokens, hidden]`, or one row for each of `queries` `[queries, hidden]`.

    `weights` are weight and bias of each of NAMES, in this order, in any floating type; products are in that of
    `hidden`.
    """
    return cast(Tensor, _FusedLayer.apply(hidden, queries, bounds, settings, *weights))  # type: ignore[no-untyped-call]


class FrozenCasts:
    """Half-precision copies of a layer's frozen weights, made once and not at each step."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Callable[[], Tensor | None], tuple[int, int, torch.dtype], Tensor]] = {}

    def __call__(self, place: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype` if it is frozen, as it is otherwise; `place` names it within the layer."""
        if weight.dtype == dtype or weight.requires_grad:
            return weight
        state = (weight._version, weight.data_ptr(), dtype)
        whose, when, copied = self._held.get(place, (lambda: None, None, weight))
        if whose() is not weight or when != state:
            with torch.inference_mode(False), torch.no_grad():  # it may serve training later
                copied = weight.detach().to(dtype)
            self._held[place] = weakref.ref(weight), state, copied
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCasts:
        """A copied layer has weights of its own."""
        return FrozenCasts()


def _kernels(settings: Settings) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Attention, residual LayerNorm, linear GELU: two of each, with functions of the same names."""
    if settings.triton:
        from bertforge.kernels import attention_triton, layer_norm_triton, linear_gelu_triton

        return attention_triton, layer_norm_triton, linear_gelu_triton
    return attention_cpu, layer_norm, linear_gelu


class _FusedLayer(torch.autograd.Function):
    """In `ctx.needs_input_grad[4:]` and what `backward` returns, weight and bias of NAMES[i] are at 2 i and 2 i + 1."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, queries: Tensor | None, bounds: Bounds, settings: Settings, *weights: Tensor
    ) -> Tensor:
        attention, norms, gelu = _kernels(settings)
        wq, bq, wk, bk, wv, bv, wo, bo, g1, c1, wi, bi, wd, bd, g2, c2 = (w.to(hidden.dtype) for w in weights)
        needs, width = ctx.needs_input_grad[4:], hidden.shape[1]
        joined, shift = torch.cat([wq, wk, wv]), torch.cat([bq, bk, bv])  # [3 * hidden, hidden], [3 * hidden]
        if queries is None:
            qkv = F.linear(hidden, joined, shift)  # [tokens, 3 * hidden]
            q, k, v = qkv.view(-1, 3, *settings.heads).unbind(1)  # [tokens, heads, head_dim]
        else:
            q = F.linear(queries, joined[:width], shift[:width]).view(-1, *settings.heads)
            kv = F.linear(hidden, joined[width:], shift[width:])  # [tokens, 2 * hidden]
            k, v = kv.view(-1, 2, *settings.heads).unbind(1)  # [tokens, heads, head_dim]
        o, lse = attention.forward(q, k, v, bounds)  # [queries, heads, head_dim]
        seeds = torch.zeros(2, dtype=torch.int32, device=hidden.device)
        if settings.dropout_p:
            seeds.random_()
        first = Norm(g1, c1, settings.eps, settings.dropout_p, seeds[:1], settings.keep and any(needs[8:10]))
        second = Norm(g2, c2, settings.eps, settings.dropout_p, seeds[1:], settings.keep and any(needs[14:16]))
        residual = hidden if queries is None else queries
        y1, kept1 = norms.residual_layer_norm(F.linear(o.flatten(1), wo, bo), residual, first)
        activated, slope = gelu.linear_gelu(y1, wi, bi, keep=settings.keep)  # [queries, intermediate]
        y2: Tensor
        y2, kept2 = norms.residual_layer_norm(F.linear(activated, wd, bd), y1, second)
        if settings.keep:
            between = slope, activated if needs[12] else None
            products = joined, wo, wi, wd
            ctx.save_for_backward(hidden, queries, q, k, v, o, lse, y1, *between, y2, *products, *kept1, *kept2)
            ctx.rest = bounds, settings, first, second, [w.dtype for w in weights]
        return y2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, queries, q, k, v, o, lse, y1, slope, activated, y2, joined, wo, wi, wd, *kept = ctx.saved_tensors
        kept1, kept2 = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        bounds, settings, first, second, dtypes = ctx.rest
        attention, norms, gelu = _kernels(settings)
        needs = ctx.needs_input_grad[4:]
        found: list[Tensor | None] = [None] * len(dtypes)

        # Without dropout a norm's two gradients are one tensor: the branch's is read before the residual's is added to.
        dy1, dd, found[14], found[15] = norms.residual_layer_norm_backward(grads[0].contiguous(), y2, kept2, second)
        found[12], found[13] = _product(dd, activated, needs[12]), _column_sums(dd, needs[13])
        du = gelu.linear_gelu_backward(dd, wd, slope)  # [queries, intermediate]
        found[10], found[11] = _product(du, y1, needs[10]), _column_sums(du, needs[11])
        dy1.addmm_(du, wi)  # [queries, hidden]
        del du, dd

        ds, da, found[8], found[9] = norms.residual_layer_norm_backward(dy1, y1, kept1, first)
        found[6], found[7] = _product(da, o.flatten(1), needs[6]), _column_sums(da, needs[7])
        do = (da @ wo).view(-1, *settings.heads)  # [queries, heads, head_dim]
        needs_hidden = ctx.needs_input_grad[0]
        if queries is None:
            parts = q.new_empty(len(hidden), 3, *settings.heads)  # [tokens, 3, heads, head_dim]
            dq, dk, dv = parts.unbind(1)
            attention.backward(do, (q, k, v, bounds), (o, lse), (dq, dk, dv))
            dhidden, dqueries = ds.addmm_(parts.flatten(1), joined) if needs_hidden else None, None
        else:
            dq, parts = torch.empty_like(q), q.new_empty(len(hidden), 2, *settings.heads)
            dk, dv = parts.unbind(1)
            attention.backward(do, (q, k, v, bounds), (o, lse), (dq, dk, dv))
            dqueries = ds.addmm_(dq.flatten(1), joined[: hidden.shape[1]])  # [queries, hidden]
            dhidden = parts.flatten(1) @ joined[hidden.shape[1] :] if needs_hidden else None  # [tokens, hidden]
        asked = hidden if queries is None else queries
        for place, (grad, x) in enumerate(((dq, asked), (dk, hidden), (dv, hidden))):
            flat = grad.flatten(1)  # [queries or tokens, hidden]
            found[2 * place] = _product(flat, x, needs[2 * place])
            found[2 * place + 1] = _column_sums(flat, needs[2 * place + 1])
        own = (None if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True))
        return dhidden, dqueries, None, None, *own


def _product(grad: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
    """A weight's gradient `[out, in]`, from that of its output `[rows, out]` and its input `[rows, in]`."""
    return grad.T @ x if wanted else None


def _column_sums(grad: Tensor, wanted: bool) -> Tensor | None:
    """A bias's gradient `[out]`, in float32."""
    return grad.sum(0, dtype=torch.float32) if wanted else None
