"""Bidirectional attention over packed short sequences: Triton kernels for the forward and the backward pass.

Texts of 184 tokens on average leave a FlashAttention kernel made for long ones waiting: large tiles are mostly padding,
and a program ends soon after its pipeline is full. Here tiles are 64 rows, several programs share a multiprocessor, and
a program works on one tile of one head, in three kernels:

- `_forward`: a tile of queries walks over its sequence's keys, softmax on the fly (Dao 2023, FlashAttention-2,
  algorithm 1).
- `_query_gradient`: a tile of queries walks over the keys for dQ; it also leaves delta, the sum of output * gradient
  over each row, which saves a pass over memory for delta alone.
- `_key_value_gradients`: a tile of keys walks over the queries for dK and dV.

That is 7 matrix products backward where FlashAttention-2 has 5, but no two programs ever add into one place: no
atomics, no float32 copy of dQ in memory, and two runs are equal bit for bit. Rejected: one program for a whole sequence
and head, which needs 5 products but holds dQ in memory between turns, and whose longest program works 64 tiles where
the mean one works 16.

Which tile is whose. Sequence i owns the tiles from `cu_seqlens[i] // BLOCK + i` on. That leaves room for its
ceil(length / BLOCK) tiles and at most one empty one, whatever the lengths are, so the grid is always
`tokens // BLOCK + sequences` tiles: lengths stay on the device and a CUDA graph can record the launch. A program finds
its sequence by counting the sequences that begin at or before its tile, one vector load and a sum. Rejected: a table of
tiles, which would be made for each batch and handed through all layers to save a program a fiftieth of its time; and a
grid of [sequences, max_seqlen / BLOCK], half of whose programs would find nothing to do.

What is kept per row, the log of the softmax's denominator and delta, is laid out the same way, with ALIGNED rows to a
tile: every sequence begins at an aligned place and has room for a whole last tile, so these loads need no mask.

Exponents are base 2 with the scale folded in: exp2(score * scale * log2(e) - maximum) is one multiply-add and one
instruction. Only the step that holds a sequence's end is masked.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
ALIGNED = tl.constexpr(128)
SEARCHED = tl.constexpr(1024)  # sequences looked at in one vector load


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up. `block` divides ALIGNED; no `step` is larger than a `block`."""

    block: int
    """Rows a program owns."""
    step: int
    """Rows on the other side that one turn of its loop takes."""
    warps: int
    stages: int
    """Turns whose loads are in flight, this one included."""


@dataclass(frozen=True)
class Tilings:
    """One head size's kernels."""

    forward: Tiling
    query_gradient: Tiling
    key_value_gradients: Tiling


TILINGS = {
    32: Tilings(Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 3), Tiling(64, 32, 4, 3)),
    64: Tilings(Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 3), Tiling(64, 32, 4, 3)),
}


@triton.jit
def _locate(cu_seqlens, sequences, tile, BLOCK: tl.constexpr):
    """Four scalars: the sequence's first token and length, the tile's first row in it, the first row's aligned place.

    The tile is empty when its first row lies past the length.
    """
    found = 0
    for first in range(0, sequences, SEARCHED):
        numbers = first + tl.arange(0, SEARCHED)
        begins = tl.load(cu_seqlens + numbers, mask=numbers < sequences, other=0)
        found += tl.sum(((begins // BLOCK + numbers <= tile) & (numbers < sequences)).to(tl.int32))
    sequence = found - 1
    begin = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - begin
    return begin, length, (tile - begin // BLOCK - sequence) * BLOCK, (begin // ALIGNED + sequence) * ALIGNED


@triton.jit
def _load_rows(first, stride, rows, length, DIM: tl.constexpr):
    """Rows of one head, `[rows, DIM]`; zeros past the sequence's end, where another sequence's tokens stand."""
    return tl.load(first + rows[:, None] * stride + tl.arange(0, DIM)[None, :], mask=rows[:, None] < length, other=0.0)


@triton.jit
def _store_rows(first, stride, rows, length, values, DIM: tl.constexpr):
    places = first + rows[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(places, values.to(first.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def _forward(
    query, key, value, output, lse, cu_seqlens, sequences, places,
    query_stride, key_stride, value_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    begin, length, first, place = _locate(cu_seqlens, sequences, tl.program_id(0) // HEADS, BLOCK)
    if first >= length:
        return
    token = begin.to(tl.int64)
    query += token * query_stride + head * DIM
    key += token * key_stride + head * DIM
    value += token * value_stride + head * DIM
    output += (token * HEADS + head) * DIM
    scale = LOG2_E * DIM**-0.5
    rows = first + tl.arange(0, BLOCK)
    q = _load_rows(query, query_stride, rows, length, DIM)  # [BLOCK, DIM]
    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(0, length, STEP):
        columns = start + tl.arange(0, STEP)
        k = _load_rows(key, key_stride, columns, length, DIM)  # [STEP, DIM]
        scores = tl.dot(q, tl.trans(k))  # [BLOCK, STEP]
        if start + STEP > length:
            scores = tl.where(columns[None, :] < length, scores, -float("inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - highest[:, None])
        fade = tl.exp2(maximum - highest)
        total = total * fade + tl.sum(weights, 1)
        maximum = highest
        v = _load_rows(value, value_stride, columns, length, DIM)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * fade[:, None])
    _store_rows(output, HEADS * DIM, rows, length, weighted * (1 / total)[:, None], DIM)
    tl.store(lse + head * places + place + rows, maximum + tl.log2(total))


@triton.jit
def _query_gradient(
    query, key, value, output, grad, lse, delta, query_grad, cu_seqlens, sequences, places,
    query_stride, key_stride, value_stride, grad_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    begin, length, first, place = _locate(cu_seqlens, sequences, tl.program_id(0) // HEADS, BLOCK)
    if first >= length:
        return
    token = begin.to(tl.int64)
    key += token * key_stride + head * DIM
    value += token * value_stride + head * DIM
    own = (token * HEADS + head) * DIM  # in tensors laid out [tokens, HEADS, DIM]
    scale = LOG2_E * DIM**-0.5
    rows = first + tl.arange(0, BLOCK)
    q = _load_rows(query + token * query_stride + head * DIM, query_stride, rows, length, DIM)  # [BLOCK, DIM]
    do = _load_rows(grad + token * grad_stride + head * DIM, grad_stride, rows, length, DIM)
    o = _load_rows(output + own, HEADS * DIM, rows, length, DIM)
    mean = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK], what softmax's backward subtracts
    tl.store(delta + head * places + place + rows, mean)
    log_total = tl.load(lse + head * places + place + rows)
    dq = tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(0, length, STEP):
        columns = start + tl.arange(0, STEP)
        k = _load_rows(key, key_stride, columns, length, DIM)  # [STEP, DIM]
        v = _load_rows(value, value_stride, columns, length, DIM)
        exponents = tl.dot(q, tl.trans(k)) * scale - log_total[:, None]  # [BLOCK, STEP]
        if start + STEP > length:
            # A key of zeros has the score 0, which may lie so far above all others that exp2 is infinite.
            exponents = tl.where(columns[None, :] < length, exponents, -float("inf"))
        ds = tl.exp2(exponents) * (tl.dot(do, tl.trans(v)) - mean[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    _store_rows(query_grad + own, HEADS * DIM, rows, length, dq * DIM**-0.5, DIM)


@triton.jit
def _key_value_gradients(
    query, key, value, grad, lse, delta, key_grad, value_grad, cu_seqlens, sequences, places,
    query_stride, key_stride, value_stride, grad_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    begin, length, first, place = _locate(cu_seqlens, sequences, tl.program_id(0) // HEADS, BLOCK)
    if first >= length:
        return
    token = begin.to(tl.int64)
    query += token * query_stride + head * DIM
    grad += token * grad_stride + head * DIM
    lse += head * places + place
    delta += head * places + place
    own = (token * HEADS + head) * DIM
    scale = LOG2_E * DIM**-0.5
    columns = first + tl.arange(0, BLOCK)
    k = _load_rows(key + token * key_stride + head * DIM, key_stride, columns, length, DIM)  # [BLOCK, DIM]
    v = _load_rows(value + token * value_stride + head * DIM, value_stride, columns, length, DIM)
    dk = tl.zeros([BLOCK, DIM], tl.float32)
    dv = tl.zeros([BLOCK, DIM], tl.float32)
    # No mask: past the end, rows of q and do are zeros and add nothing, and rows of dk and dv are not stored.
    for start in range(0, length, STEP):
        rows = start + tl.arange(0, STEP)
        q = _load_rows(query, query_stride, rows, length, DIM)  # [STEP, DIM]
        do = _load_rows(grad, grad_stride, rows, length, DIM)
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - tl.load(lse + rows)[None, :])  # [BLOCK, STEP]
        dv = tl.dot(weights.to(do.dtype), do, dv)
        ds = weights * (tl.dot(v, tl.trans(do)) - tl.load(delta + rows)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    _store_rows(key_grad + own, HEADS * DIM, columns, length, dk * DIM**-0.5, DIM)
    _store_rows(value_grad + own, HEADS * DIM, columns, length, dv, DIM)


def forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, tilings: Tilings | None = None
) -> tuple[Tensor, Tensor]:
    """The attended values `[tokens, heads, head_dim]`, and log2 of each softmax's denominator `[heads, places]`."""
    tokens, heads, dim = query.shape
    output, lse = _like(query), _per_row(query, cu_seqlens)
    q, k, v = map(_rows_together, (query, key, value))
    tiling = (tilings or TILINGS[dim]).forward
    sequences = cu_seqlens.numel() - 1
    with torch.cuda.device_of(query):
        _forward[_grid(tokens, sequences, heads, tiling)](
            q, k, v, output, lse, cu_seqlens, sequences, lse.shape[1], q.stride(0), k.stride(0), v.stride(0),
            HEADS=heads, DIM=dim, BLOCK=tiling.block, STEP=tiling.step,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return output, lse


def backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor, lse: Tensor,
    tilings: Tilings | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value from that of `output`; `inputs` are `forward`'s, `lse` its second result."""
    query, key, value, cu_seqlens = inputs
    tokens, heads, dim = query.shape
    query_grad, key_grad, value_grad = map(_like, (query, key, value))
    delta = torch.empty_like(lse)
    q, k, v, do = map(_rows_together, (query, key, value, grad))
    bounds = (cu_seqlens, cu_seqlens.numel() - 1, lse.shape[1])
    strides = (q.stride(0), k.stride(0), v.stride(0), do.stride(0))
    tilings = tilings or TILINGS[dim]
    with torch.cuda.device_of(query):
        tiling = tilings.query_gradient
        _query_gradient[_grid(tokens, bounds[1], heads, tiling)](
            q, k, v, output, do, lse, delta, query_grad, *bounds, *strides,
            HEADS=heads, DIM=dim, BLOCK=tiling.block, STEP=tiling.step,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        tiling = tilings.key_value_gradients
        _key_value_gradients[_grid(tokens, bounds[1], heads, tiling)](
            q, k, v, do, lse, delta, key_grad, value_grad, *bounds, *strides,
            HEADS=heads, DIM=dim, BLOCK=tiling.block, STEP=tiling.step,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return query_grad, key_grad, value_grad


def _grid(tokens: int, sequences: int, heads: int, tiling: Tiling) -> tuple[int]:
    # Heads vary fastest: neighbours in time are neighbours in memory.
    return ((tokens // tiling.block + sequences) * heads,)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)  # [tokens, heads, head_dim], whatever x's strides


def _per_row(query: Tensor, cu_seqlens: Tensor) -> Tensor:
    places = (query.shape[0] // ALIGNED.value + cu_seqlens.numel() - 1) * ALIGNED.value
    return torch.empty(query.shape[1], places, dtype=torch.float32, device=query.device)  # [heads, places]


def _rows_together(x: Tensor) -> Tensor:
    """`x` itself where a token's heads lie side by side, as in a slice of joined query, key and value; else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


@torch.library.custom_op("bertforge::packed_attention", mutates_args=())
def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`forward` as an operator that autograd, torch.compile and CUDA graphs take; only the first result has a gradient.

    `query`, `key`, `value` are `[tokens, heads, head_dim]`, head_dim one of TILINGS; `cu_seqlens` is
    `[sequences + 1]` int32, its last entry the number of tokens; sequences may be empty.
    """
    return forward(query, key, value, cu_seqlens)


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return _like(query), _per_row(query, cu_seqlens)


@torch.library.custom_op("bertforge::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` as an operator."""
    return backward(grad, (query, key, value, cu_seqlens), output, lse)


@packed_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *packed_attention_backward(grad, *ctx.saved_tensors), None


packed_attention.register_autograd(_differentiate, setup_context=_save)
