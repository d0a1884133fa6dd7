"""A BERT layer, forward and backward written out by hand over packed tokens.

It computes what the modules of `BertLayer` do. Autograd differentiates those one operator at a time: every sum of two
gradients is a pass over all hidden states, every operator keeps its inputs, and query, key and value each have products
of their own. Written out,

- query, key and value are one product forward, and one backward for the hidden states they share;
- the gradient that comes along a residual is the addend of the product that ends its branch, so no sum is a pass;
- dropout, residual and LayerNorm are one kernel, the feed-forward's first product and GELU another;
- only what the next step cannot give back is kept: the projections, the attended values, both LayerNorms' outputs and
  GELU's slopes in 8 bits, 12 KB a token at a width of 768 where the layer is frozen;
- a frozen weight costs no product, and a layer whose input needs no gradient stops there.

With `Settings.fp8` the four products of a frozen feed-forward are those of e4m3 numbers (kernels/fp8.py), two thirds of
what a layer multiplies with weights. Query, key and value are trained through, and for attention's output the product
saves no more than converting what attention gives would cost. The sum of two gradients after such a product is taken
where LayerNorm's backward reads them.

With `queries` the layer is computed for these tokens alone, as the last layer is: a classifier reads first tokens only.

On CUDA attention, dropout with LayerNorm and the product with GELU are Triton kernels. A CPU has no launches to save,
but the same passes and casts: there they are torch's operators, in bfloat16 or float32, and keep GELU's input and the
softmax's weights instead of what would be worked out again.
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
from torch.autograd.function import once_differentiable

from bertforge.kernels import attention_cpu, fp8, layer_norm, linear_gelu
from bertforge.kernels.attention import Bounds
from bertforge.kernels.fp8 import E4M3, Fp8Rows, Fp8Weight
from bertforge.kernels.layer_norm import Norm

NAMES = ("query", "key", "value", "attention.output", "attention.norm", "intermediate", "output", "norm")
NORMS = (8, 9, 14, 15)  # places of the LayerNorms among the weights: they work in float32 and are not rounded


@dataclass(frozen=True)
class Fp8Weights:
    """The products that are in e4m3."""

    intermediate: Fp8Weight
    """[intermediate, hidden]."""
    output: Fp8Weight
    """[hidden, intermediate]."""


FP8_PLACES = (10, 12)  # of these weights among those of NAMES


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
    fp8: Fp8Weights | None = None
    """Copies of the frozen weights whose products are in e4m3; their biases are frozen too."""


def fused_layer(
    hidden: Tensor, queries: Tensor | None, bounds: Bounds, settings: Settings, weights: tuple[Tensor, ...]
) -> Tensor:
    """`hidden` `[tokens, hidden]` -> `[tokens, hidden]`, or one row for each of `queries` `[queries, hidden]`.

    `weights` are weight and bias of each of NAMES, in this order, in any floating type; products are in that of
    `hidden`.
    """
    return cast(Tensor, _FusedLayer.apply(hidden, queries, bounds, settings, *weights))  # type: ignore[no-untyped-call]


class FrozenCasts:
    """Copies of a layer's frozen weights in other types, made once and not at each step."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], tuple[Callable[[], Tensor | None], tuple[Any, ...], Any]] = {}

    def __call__(self, place: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype` if it is frozen, as it is otherwise; `place` is that among the layer's weights."""
        if weight.dtype == dtype or weight.requires_grad or place in NORMS:
            return weight
        copied: Tensor = self._made((place, "cast"), weight, dtype, lambda: weight.detach().to(dtype))
        return copied

    def fp8(self, place: int, weight: Tensor) -> Fp8Weight:
        """A frozen `weight` for products in e4m3."""
        copied: Fp8Weight = self._made((place, "fp8"), weight, E4M3, lambda: Fp8Weight.of(weight))
        return copied

    def _made(self, key: tuple[int, str], weight: Tensor, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
        state = (weight._version, weight.data_ptr(), dtype)
        whose, when, copied = self._held.get(key, (lambda: None, None, weight))
        if whose() is not weight or when != state:
            with torch.inference_mode(False), torch.no_grad():  # it may serve training later
                copied = make()
            self._held[key] = weakref.ref(weight), state, copied
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCasts:
        """A copied layer has weights of its own."""
        return FrozenCasts()


def _kernels(settings: Settings) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Attention, residual LayerNorm, linear GELU: two of each, with functions of the same names."""
    if settings.triton:
        from bertforge.kernels import attention_triton, layer_norm_triton, linear_gelu_triton

        # Before Hopper Triton's product would load a tile, wait, and multiply: without copies in flight, cuBLAS wins.
        ahead = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
        return attention_triton, layer_norm_triton, linear_gelu_triton if ahead or settings.fp8 else linear_gelu
    return attention_cpu, layer_norm, linear_gelu


class _FusedLayer(torch.autograd.Function):
    """In `ctx.needs_input_grad[4:]` and what `backward` returns, weight and bias of NAMES[i] are at 2 i and 2 i + 1."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, queries: Tensor | None, bounds: Bounds, settings: Settings, *weights: Tensor
    ) -> Tensor:
        attention, norms, _ = _kernels(settings)
        halves = (w if place in NORMS else w.to(hidden.dtype) for place, w in enumerate(weights))
        wq, bq, wk, bk, wv, bv, wo, bo, g1, c1, wi, bi, wd, bd, g2, c2 = halves
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
        first = Norm(g1, c1, settings.eps, settings.dropout_p, seeds[:1], settings.keep and any(needs[7:10]))
        second = Norm(g2, c2, settings.eps, settings.dropout_p, seeds[1:], settings.keep and any(needs[13:16]))
        residual = hidden if queries is None else queries
        copied = torch.empty_like(residual, dtype=E4M3) if settings.fp8 else None
        y1, kept1 = norms.residual_layer_norm(F.linear(o.flatten(1), wo, bo), residual, first, fp8=copied)
        fed, activated, slope = _feed_forward(y1 if copied is None else copied, (wi, bi, wd, bd), settings)
        y2: Tensor
        y2, kept2 = norms.residual_layer_norm(fed, y1, second)
        if settings.keep:
            between = slope, activated if needs[12] else None
            products = joined, wo, wi, wd
            ctx.save_for_backward(hidden, queries, q, k, v, o, lse, y1, *between, y2, *products, *kept1, *kept2)
            ctx.rest = bounds, settings, first, second, [w.dtype for w in weights]
        return y2

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # it writes into what it has read
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, queries, q, k, v, o, lse, y1, slope, activated, y2, joined, wo, wi, wd, *norms_kept = ctx.saved_tensors
        kept1, kept2 = norms_kept[: len(norms_kept) // 2], norms_kept[len(norms_kept) // 2 :]
        bounds, settings, first, _, dtypes = ctx.rest
        attention, norms, _ = _kernels(settings)
        needs = ctx.needs_input_grad[4:]
        found: list[Tensor | None] = [None] * len(dtypes)

        kept = y1, slope, activated, y2, kept2, wi, wd
        dy1, addend = _feed_forward_backward(grads[0].contiguous(), kept, ctx, found)  # [queries, hidden]
        ds, da, sums = norms.residual_layer_norm_backward(dy1, y1, kept1, first, addend=addend)
        found[6:10] = _product(da, o.flatten(1)) if needs[6] else None, sums.x, sums.weight, sums.bias
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
        if queries is None and all(needs[:6]):
            found[0:6:2] = _product(parts.flatten(1), hidden).chunk(3)
            found[1:6:2] = parts.flatten(1).sum(0, dtype=torch.float32).chunk(3)
        else:
            asked = hidden if queries is None else queries
            for place, (grad, x) in enumerate(((dq, asked), (dk, hidden), (dv, hidden))):
                flat = grad.flatten(1)  # [queries or tokens, hidden]
                found[2 * place] = _product(flat, x) if needs[2 * place] else None
                found[2 * place + 1] = flat.sum(0, dtype=torch.float32) if needs[2 * place + 1] else None
        own = (
            g.to(dtype) if needed and g is not None else None
            for g, dtype, needed in zip(found, dtypes, needs, strict=True)
        )
        return dhidden, dqueries, None, None, *own


def _feed_forward(
    x: Tensor, weights: tuple[Tensor, ...], settings: Settings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The branch's result `[rows, hidden]`; the activations `[rows, intermediate]`, none from e4m3; GELU's slopes."""
    *_, gelu = _kernels(settings)
    wi, bi, wd, bd = weights
    if settings.fp8:
        short, slope = gelu.linear_gelu_fp8(x, settings.fp8.intermediate, bi, keep=settings.keep)
        return fp8.linear(short, settings.fp8.output, bd), None, slope
    activated, slope = gelu.linear_gelu(x, wi, bi, keep=settings.keep)
    return F.linear(activated, wd, bd), activated, slope


def _feed_forward_backward(
    grad: Tensor, kept: tuple[Any, ...], ctx: Any, found: list[Tensor | None]
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """From the layer's result to the feed-forward's input: its gradient, and in e4m3 an addend and its rows' scales.

    Those of weights and biases are put into `found`.
    """
    y1, slope, activated, y2, kept2, wi, wd = kept
    _, settings, _, second, _ = ctx.rest
    _, norms, gelu = _kernels(settings)
    needs = ctx.needs_input_grad[4:]
    if weights := settings.fp8:
        rows = Fp8Rows.empty(y2)
        dy1, _, sums = norms.residual_layer_norm_backward(grad, y2, kept2, second, fp8=rows)
        found[14:] = sums.weight, sums.bias
        du = gelu.linear_gelu_fp8_backward(rows, weights.output, slope)  # [queries, intermediate]
        return dy1, (fp8.linear_backward(du, weights.output.growth, weights.intermediate, y1.dtype), rows.scale)
    # Without dropout a norm's two gradients are one tensor: the branch's is read before the residual's is added to.
    dy1, dd, sums = norms.residual_layer_norm_backward(grad, y2, kept2, second)
    found[12:] = _product(dd, activated) if needs[12] else None, sums.x, sums.weight, sums.bias
    du, found[11] = gelu.linear_gelu_backward(dd, wd, slope, sums=needs[11])  # [queries, intermediate]
    found[10] = _product(du, y1) if needs[10] else None
    return dy1.addmm_(du, wi), None


def _product(grad: Tensor, x: Tensor) -> Tensor:
    """A weight's gradient `[out, in]`, from that of its output `[rows, out]` and its input `[rows, in]`."""
    # On CUDA in float32, as it is summed up; rounded to half precision it would be turned into float32 right after.
    return torch.mm(grad.T, x, out_dtype=torch.float32) if grad.is_cuda else grad.T @ x
