"""Bidirectional attention over packed short sequences on a CPU, forward and backward, by matrix products.

torch's fused CPU attention multiplies in float32 backward, and takes even longer when given bfloat16. A sequence of a
few hundred tokens has few enough scores to be written out: those of 12 heads over 192 tokens are 0.9 MB in bfloat16 and
stay in the cache between the product that makes them and the softmax that reads them. So a sequence is two products of
all its heads and four backward, which AMX multiplies, and the softmax's weights are kept for backward.

A product's kernel is generated for its shape and kept. Lengths are rounded up to multiples of STEP, so that all
sequences up to 512 tokens share 16 shapes: the keys that fill up get no weight, the queries no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bertforge.kernels.attention import Bounds

STEP = 32


def forward(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The attended values `[queries, heads, head_dim]`, and the softmax's weights, one sequence after another, flat.

    `query` is `[queries, heads, head_dim]`, `key` and `value` are `[tokens, heads, head_dim]`, slices of joined
    projections too. A sequence may be empty; a query of an empty sequence attends to zero.
    """
    _, heads, dim = query.shape
    output = query.new_zeros(query.shape)
    sequences = _sequences(bounds, heads)
    weights = query.new_empty(sum(s.size for s in sequences))
    scratch = _scratch(weights, sequences)
    for s in sequences:
        q, k, v = _heads_first(query[s.queries]), _heads_first(key[s.keys]), _heads_first(value[s.keys])
        own, scores = weights[s.begin :][: s.size].view(s.shape), scratch[: s.size].view(s.shape)
        torch.baddbmm(scratch[:1], q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(dim), out=scores)
        scores[:, :, s.keys.stop - s.keys.start :] = -math.inf
        torch._softmax(scores, -1, False, out=own)
        _write(torch.bmm(own, v), output[s.queries])
    return output, weights


def backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Bounds],
    results: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of query, key and value, from that of the attended values.

    `inputs` and `results` are `forward`'s; `gradients` are shaped like query, key and value, and may be slices of a
    tensor that joins them.
    """
    query, key, value, bounds = inputs
    query_grad, key_grad, value_grad = gradients
    _, heads, dim = query.shape
    if bounds.queries is not bounds.keys:
        for part in gradients:
            part.zero_()  # of queries that have no keys, and of keys that nobody asks
    sequences = _sequences(bounds, heads)
    scratch = _scratch(results[1], sequences)
    for s in sequences:
        q, k, v = _heads_first(query[s.queries]), _heads_first(key[s.keys]), _heads_first(value[s.keys])
        do, weights = _heads_first(grad[s.queries]), results[1][s.begin :][: s.size].view(s.shape)
        _write(torch.bmm(weights.transpose(1, 2), do), value_grad[s.keys])
        ds = scratch[: s.size].view(s.shape)  # first the weights' gradient, then the scores'
        torch.bmm(do, v.transpose(1, 2), out=ds)
        torch._softmax_backward_data(ds, weights, -1, ds.dtype, grad_input=ds)
        _write(_scaled_product(ds, k, dim), query_grad[s.queries])
        _write(_scaled_product(ds.transpose(1, 2), q, dim), key_grad[s.keys])


@dataclass(frozen=True)
class _Sequence:
    """Where a sequence's queries and keys are in the pack, and its weights in the flat tensor of all."""

    queries: slice
    keys: slice
    shape: tuple[int, int, int]
    """Of its weights: heads, queries, keys, filled up."""
    begin: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _sequences(bounds: Bounds, heads: int) -> list[_Sequence]:
    """Those that are not empty."""
    queries, keys = bounds.queries.tolist(), bounds.keys.tolist()
    found, begin = [], 0
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
        if a < b and c < d:
            found.append(_Sequence(slice(a, b), slice(c, d), (heads, _filled(b - a), _filled(d - c)), begin))
            begin += found[-1].size
    return found


def _scratch(like: Tensor, sequences: list[_Sequence]) -> Tensor:
    """Room for the longest sequence's scores, reused by all: memory that stays in the cache."""
    return like.new_empty(max((s.size for s in sequences), default=1))


def _filled(length: int) -> int:
    return -(-length // STEP) * STEP


def _heads_first(x: Tensor) -> Tensor:
    """`[length, heads, head_dim]` -> `[heads, length filled up with zeros, head_dim]`."""
    length, heads, dim = x.shape
    filled = x.new_empty(heads, _filled(length), dim)
    filled[:, :length] = x.transpose(0, 1)
    filled[:, length:] = 0
    return filled


def _write(x: Tensor, place: Tensor) -> None:
    """`_heads_first` undone, into `place` `[length, heads, head_dim]`."""
    place.copy_(x[:, : len(place)].transpose(0, 1))


def _scaled_product(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """a b / sqrt(`dim`), `[heads, n, m]`."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=1 / math.sqrt(dim))
