"""Bidirectional attention over packed short sequences on a CPU, forward and backward, by matrix products.

torch's fused CPU attention multiplies in float32 backward, and takes even longer when given bfloat16. A sequence of a
few hundred tokens has few enough scores to be written out: those of 12 heads over 192 tokens are 0.9 MB in bfloat16 and
stay in the cache between the product that makes them and the softmax that reads them. So attention is two batched
products and four backward, which AMX multiplies, and the softmax's weights are kept for backward.

Calling an operator costs more than twenty tokens of one sequence give it to do. Sequences of like length are therefore
multiplied together, up to SCORES scores a head: gathered heads first, `[heads * sequences, length, head_dim]`, and
gathered back once for the whole pack. Which tokens go where is worked out once a pack, for all layers.

A product's kernel is generated for its shape and kept. So lengths are rounded up, and the sequences of one length are
taken by powers of two: some thirty shapes in all up to 512 tokens. What fills up a sequence is its own last token
again: as a key it gets no weight, as a query no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bertforge.kernels.attention import Bounds

STEP = 32
SCORES = 2**14


def forward(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The attended values `[queries, heads, head_dim]`, and the softmax's weights, one group after another, flat.

    `query` is `[queries, heads, head_dim]`, `key` and `value` are `[tokens, heads, head_dim]`, slices of joined
    projections too. A sequence may be empty; a query of an empty sequence attends to zero.
    """
    _, heads, dim = query.shape
    plan = _plan(bounds)
    query, key, value = plan.queries.laid(query), plan.keys.laid(key), plan.keys.laid(value)
    output = plan.queries.room(query)
    weights = query.new_empty(heads * plan.scores)
    scratch = query.new_empty(heads * max((g.scores for g in plan.groups), default=0))
    for group in plan.groups:
        q, k, v = group.queries.of(query), group.keys.of(key), group.keys.of(value)
        own, scores = group.weights(weights, heads), group.scratch(scratch, heads)
        torch.baddbmm(scratch[:1], q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(dim), out=scores)
        group.keys.fill(scores.transpose(1, 2), -math.inf)
        torch._softmax(scores, -1, False, out=own)
        group.queries.put(torch.bmm(own, v), output)
    return plan.queries.back(output), weights


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
    _, heads, dim = query.shape
    plan = _plan(bounds)
    query, key, value, grad = (
        side.laid(x)
        for side, x in zip((plan.queries, plan.keys, plan.keys, plan.queries), (query, key, value, grad), strict=True)
    )
    dq, dk, dv = plan.queries.room(query), plan.keys.room(key), plan.keys.room(value)
    scratch = query.new_empty(heads * max((g.scores for g in plan.groups), default=0))
    for group in plan.groups:
        q, k, v = group.queries.of(query), group.keys.of(key), group.keys.of(value)
        do, weights = group.queries.of(grad), group.weights(results[1], heads)
        group.queries.fill(do, 0)
        group.keys.put(torch.bmm(weights.transpose(1, 2), do), dv)
        ds = group.scratch(scratch, heads)  # first the weights' gradient, then the scores'
        torch.bmm(do, v.transpose(1, 2), out=ds)
        torch._softmax_backward_data(ds, weights, -1, ds.dtype, grad_input=ds)
        group.queries.put(_scaled_product(ds, k, dim), dq)
        group.keys.put(_scaled_product(ds.transpose(1, 2), q, dim), dk)
    for place, side, found in zip(gradients, (plan.queries, plan.keys, plan.keys), (dq, dk, dv), strict=True):
        place.copy_(side.back(found))


@dataclass(frozen=True)
class _Tokens:
    """The queries or the keys of a group, every sequence filled up to `length` tokens."""

    rows: slice
    """Where they stand among all groups' tokens."""
    length: int
    fillers: Tensor
    """[sequences, length - tokens of the shortest sequence] bool: what fills up among the last tokens."""

    def of(self, x: Tensor) -> Tensor:
        """`[all groups' tokens, heads, head_dim]` -> `[heads * sequences, length, head_dim]`, a copy."""
        return x[self.rows].transpose(0, 1).contiguous().view(-1, self.length, x.shape[2])

    def fill(self, x: Tensor, value: float) -> None:
        """Writes `value` over what fills up in `x` `[heads * sequences, length, any]`."""
        sequences, some = self.fillers.shape
        if some:
            last = x[:, self.length - some :]  # [heads * sequences, some, any]
            last.view(-1, sequences, *last.shape[1:]).masked_fill_(self.fillers[:, :, None], value)

    def put(self, x: Tensor, filled: Tensor) -> None:
        """`of` undone, into the rows of `filled` `[all groups' tokens + 1, heads, head_dim]`."""
        place = filled[self.rows]  # [sequences * length, heads, head_dim]
        place.copy_(x.view(filled.shape[1], len(place), -1).transpose(0, 1))


@dataclass(frozen=True)
class _Group:
    """Sequences that are multiplied together."""

    queries: _Tokens
    keys: _Tokens
    begin: int
    """Where its weights begin, a head's."""
    scores: int
    """A head's number of them."""

    def weights(self, flat: Tensor, heads: int) -> Tensor:
        """Its part of all groups' weights, `[heads * sequences, queries, keys]`."""
        return self.scratch(flat[heads * self.begin :], heads)

    def scratch(self, flat: Tensor, heads: int) -> Tensor:
        """The beginning of `flat` as `[heads * sequences, queries, keys]`."""
        return flat[: heads * self.scores].view(-1, self.queries.length, self.keys.length)


@dataclass(frozen=True)
class _Side:
    """The queries or the keys of all groups."""

    places: Tensor
    """[tokens of all groups] int64, in the pack; a sequence's last one again and again where it is filled up."""
    rows: Tensor
    """[tokens of the pack] int64, among those of all groups; one past them for a token that is in no group."""

    def laid(self, x: Tensor) -> Tensor:
        """`[tokens, heads, head_dim]` -> `[tokens of all groups, heads, head_dim]`."""
        return x.index_select(0, self.places)

    def room(self, laid: Tensor) -> Tensor:
        """For as many rows as in `laid`, and one of zeros."""
        rows = laid.new_empty(len(laid) + 1, *laid.shape[1:])
        rows[-1] = 0
        return rows

    def back(self, room: Tensor) -> Tensor:
        """`laid` undone, from the rows of `room`."""
        return room.index_select(0, self.rows)


@dataclass(frozen=True)
class _Plan:
    groups: list[_Group]
    queries: _Side
    keys: _Side

    @property
    def scores(self) -> int:
        """A head's, of all groups."""
        return sum(group.scores for group in self.groups)


@lru_cache(maxsize=2)  # a pack has two: of all tokens, and of first tokens that ask all
def _plan(bounds: Bounds) -> _Plan:
    ends = [side.numpy().astype(np.int64) for side in (bounds.queries, bounds.keys)]
    starts, lengths = np.stack([side[:-1] for side in ends]), np.stack([np.diff(side) for side in ends])
    filled = _filled(lengths)  # [2, sequences]
    places: list[list[np.ndarray]] = [[], []]
    rows = [np.full(side[-1], -1) for side in ends]
    counts, begin, groups = [0, 0], 0, []
    for members in _groups(filled, np.asarray((lengths > 0).all(axis=0))):
        parts = []
        for side in (0, 1):
            length, own = int(filled[side, members[0]]), lengths[side, members, None]  # [sequences, 1]
            offsets = np.arange(length)
            tokens = starts[side, members, None] + np.minimum(offsets, own - 1)  # [sequences, length]
            where = slice(counts[side], counts[side] + tokens.size)
            real = offsets < own
            rows[side][tokens[real]] = np.arange(where.start, where.stop).reshape(tokens.shape)[real]
            places[side].append(tokens.ravel())
            parts.append(_Tokens(where, length, torch.from_numpy(~real[:, own.min() :])))
            counts[side] = where.stop
        scores = len(members) * parts[0].length * parts[1].length
        groups.append(_Group(parts[0], parts[1], begin, scores))
        begin += scores
    sides = (
        _Side(
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *places[side]])),
            torch.from_numpy(np.where(rows[side] < 0, counts[side], rows[side])),
        )
        for side in (0, 1)
    )
    return _Plan(groups, *sides)


def _groups(filled: np.ndarray, real: np.ndarray) -> Iterator[np.ndarray]:
    """The `real` sequences `[sequences]` of one shape, `filled` queries and keys `[2, sequences]`, by powers of two."""
    for queries, keys in np.unique(filled[:, real], axis=1).T:
        members = np.flatnonzero(real & (filled[0] == queries) & (filled[1] == keys))
        most = max(1, SCORES // int(queries * keys))
        while len(members):
            count = 1 << (min(most, len(members)).bit_length() - 1)
            yield members[:count]
            members = members[count:]


def _filled(lengths: np.ndarray) -> np.ndarray:
    """Rounded up: to STEP, to half of it for the shortest, where STEP may double them; one token stays alone."""
    step = np.where(lengths > 2 * STEP, STEP, STEP // 2)
    return np.where(lengths == 1, 1, -(-lengths // step) * step)


def _scaled_product(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """a b / sqrt(`dim`), `[heads * sequences, n, m]`."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=1 / math.sqrt(dim))
