"""Bidirectional attention over packed short sequences: Triton kernels, forward and backward.

Texts of 184 tokens on average leave a FlashAttention kernel made for long ones waiting: large tiles are mostly padding,
and a program ends soon after its pipeline is full. Here tiles are 64 rows, several programs share a multiprocessor, and
a program works on one tile of one head, in three kernels:

- `_attention_forward`: a tile of queries walks over its sequence's keys, softmax on the fly (Dao 2023,
  FlashAttention-2, algorithm 1).
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

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertforge.kernels.attention import Bounds
from bertforge.kernels.overlap_triton import overlaps, wait_for_inputs
from bertforge.kernels.rounding_triton import rounded_to

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
    registers: int | None = None
    """The most a thread may have, for more programs on a multiprocessor at a time; None leaves it to the compiler."""


@dataclass(frozen=True)
class Tilings:
    """One head size's kernels."""

    forward: Tiling
    query_gradient: Tiling
    key_value_gradients: Tiling


TILINGS = {
    32: Tilings(Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 3), Tiling(64, 32, 4, 3)),
    # Of the last kernel's programs three fit on a multiprocessor with the 136 registers that it would take (209 us a
    # layer of BERT-base, 32,768 tokens, H100), and four with 128 (196 us).
    64: Tilings(Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 3), Tiling(64, 32, 4, 3, 128)),
}


@triton.jit
def _locate(cu_seqlens, sequences, tile, BLOCK: tl.constexpr):
    """The tile's sequence, and the tile's first row in it.

    The tile is empty when its first row lies past the sequence's length.
    """
    found = 0
    for first in range(0, sequences, SEARCHED):
        numbers = first + tl.arange(0, SEARCHED)
        begins = tl.load(cu_seqlens + numbers, mask=numbers < sequences, other=0)
        found += tl.sum(((begins // BLOCK + numbers <= tile) & (numbers < sequences)).to(tl.int32))
    sequence = found - 1
    return sequence, (tile - tl.load(cu_seqlens + sequence) // BLOCK - sequence) * BLOCK


@triton.jit
def _bounds(cu_seqlens, sequence):
    """The sequence's first token (int64, for it is multiplied with strides) and its length."""
    begin = tl.load(cu_seqlens + sequence)
    return begin.to(tl.int64), tl.load(cu_seqlens + sequence + 1) - begin


@triton.jit
def _place(begin, sequence):
    """Where the sequence's first row has its lse and delta."""
    return (begin // ALIGNED + sequence) * ALIGNED


@triton.jit
def _load_rows(first, stride, rows, length, DIM: tl.constexpr):
    """Rows of one head, `[rows, DIM]`; zeros past the sequence's end, where another sequence's tokens stand."""
    return tl.load(first + rows[:, None] * stride + tl.arange(0, DIM)[None, :], mask=rows[:, None] < length, other=0.0)


@triton.jit
def _store_rows(first, stride, rows, length, values, DIM: tl.constexpr):
    places = first + rows[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(places, rounded_to(values, first.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def _attention_forward(
    query, key, value, output, lse, affine, cu_seqlens_q, cu_seqlens_k, sequences, places,
    query_stride, key_stride, value_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    head = tl.program_id(0) % HEADS
    sequence, first = _locate(cu_seqlens_q, sequences, tl.program_id(0) // HEADS, BLOCK)
    own, queries = _bounds(cu_seqlens_q, sequence)
    if first >= queries:
        return
    begin, length = _bounds(cu_seqlens_k, sequence)
    query += own * query_stride + head * DIM
    key += begin * key_stride + head * DIM
    value += begin * value_stride + head * DIM
    scale = LOG2_E * DIM**-0.5
    rows = first + tl.arange(0, BLOCK)
    q = _load_rows(query, query_stride, rows, queries, DIM)  # [BLOCK, DIM]
    if affine is not None:
        affine += head * DIM + tl.arange(0, DIM)
        q = (q.to(tl.float32) * tl.load(affine)[None, :] + tl.load(affine + HEADS * DIM)[None, :]).to(q.dtype)
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
    output += (own * HEADS + head) * DIM
    share = tl.where(total > 0, 1 / total, 0.0)  # a query without keys gets zeros
    weighted *= share[:, None]
    if affine is not None:
        weighted = weighted * tl.load(affine + 2 * HEADS * DIM)[None, :] + tl.load(affine + 3 * HEADS * DIM)[None, :]
    _store_rows(output, HEADS * DIM, rows, queries, weighted, DIM)
    if lse is not None:
        tl.store(lse + head * places + _place(own, sequence) + rows, maximum + tl.log2(total))


@triton.jit
def _query_gradient(
    query, key, value, output, grad, lse, delta, query_grad, cu_seqlens_q, cu_seqlens_k, sequences, places,
    query_stride, key_stride, value_stride, grad_stride, query_grad_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    sequence, first = _locate(cu_seqlens_q, sequences, tl.program_id(0) // HEADS, BLOCK)
    own, queries = _bounds(cu_seqlens_q, sequence)
    if first >= queries:
        return
    begin, length = _bounds(cu_seqlens_k, sequence)
    place = _place(own, sequence)
    key += begin * key_stride + head * DIM
    value += begin * value_stride + head * DIM
    scale = LOG2_E * DIM**-0.5
    rows = first + tl.arange(0, BLOCK)
    q = _load_rows(query + own * query_stride + head * DIM, query_stride, rows, queries, DIM)  # [BLOCK, DIM]
    do = _load_rows(grad + own * grad_stride + head * DIM, grad_stride, rows, queries, DIM)
    o = _load_rows(output + (own * HEADS + head) * DIM, HEADS * DIM, rows, queries, DIM)
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
    query_grad += own * query_grad_stride + head * DIM
    _store_rows(query_grad, query_grad_stride, rows, queries, dq * DIM**-0.5, DIM)


@triton.jit
def _key_value_gradients(
    query, key, value, grad, lse, delta, key_grad, value_grad, cu_seqlens_q, cu_seqlens_k, sequences, places,
    query_stride, key_stride, value_stride, grad_stride, key_grad_stride, value_grad_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    sequence, first = _locate(cu_seqlens_k, sequences, tl.program_id(0) // HEADS, BLOCK)
    own, length = _bounds(cu_seqlens_k, sequence)
    if first >= length:
        return
    begin, queries = _bounds(cu_seqlens_q, sequence)
    query += begin * query_stride + head * DIM
    grad += begin * grad_stride + head * DIM
    lse += head * places + _place(begin, sequence)
    delta += head * places + _place(begin, sequence)
    scale = LOG2_E * DIM**-0.5
    columns = first + tl.arange(0, BLOCK)
    k = _load_rows(key + own * key_stride + head * DIM, key_stride, columns, length, DIM)  # [BLOCK, DIM]
    v = _load_rows(value + own * value_stride + head * DIM, value_stride, columns, length, DIM)
    dk = tl.zeros([BLOCK, DIM], tl.float32)
    dv = tl.zeros([BLOCK, DIM], tl.float32)
    # No mask: past the end, rows of q and do are zeros and add nothing, and rows of dk and dv are not stored.
    for start in range(0, queries, STEP):
        rows = start + tl.arange(0, STEP)
        q = _load_rows(query, query_stride, rows, queries, DIM)  # [STEP, DIM]
        do = _load_rows(grad, grad_stride, rows, queries, DIM)
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - tl.load(lse + rows)[None, :])  # [BLOCK, STEP]
        dv = tl.dot(weights.to(do.dtype), do, dv)
        ds = weights * (tl.dot(v, tl.trans(do)) - tl.load(delta + rows)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    _store_rows(key_grad + own * key_grad_stride + head * DIM, key_grad_stride, columns, length, dk * DIM**-0.5, DIM)
    _store_rows(value_grad + own * value_grad_stride + head * DIM, value_grad_stride, columns, length, dv, DIM)


def forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, tilings: Tilings | None = None
) -> tuple[Tensor, Tensor]:
    """The attended values `[queries, heads, head_dim]`, and log2 of each softmax's denominator `[heads, places]`.

    `query` is `[queries, heads, head_dim]`, `key` and `value` are `[tokens, heads, head_dim]`, head_dim one of TILINGS;
    slices of joined projections are read where they are. A sequence may be empty.
    """
    queries, heads, dim = query.shape
    sequences = bounds.queries.numel() - 1
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    places = (queries // ALIGNED.value + sequences) * ALIGNED.value
    lse = torch.empty(heads, places, dtype=torch.float32, device=query.device)
    q, k, v = map(_rows_together, (query, key, value))
    _launch_forward((q, k, v), output, (lse, None), bounds, (tilings or TILINGS[dim]).forward)
    return output, lse


def infer(
    query: Tensor, key: Tensor, value: Tensor, affine: Tensor, bounds: Bounds, output: Tensor,
    tiling: Tiling | None = None,
) -> None:  # fmt: skip
    """`forward` for inference: writes what is attended into `output` `[queries, heads, head_dim]`, 8 bits or more.

    The projections come as the products alone, without scales and biases. `affine` `[4, heads, head_dim]` float32 has
    what the queries are multiplied with and what is added then, and the same for the result. That is enough: a scale of
    the keys can as well be the queries', a bias of the keys adds one number to all scores of a query, which softmax
    does not see, and weights that add up to 1 leave a bias of the values as it is.
    """
    tiling = tiling or TILINGS[query.shape[2]].forward
    _launch_forward((query, key, value), output, (None, affine), bounds, tiling)


def _launch_forward(
    projections: tuple[Tensor, Tensor, Tensor], output: Tensor, rest: tuple[Tensor | None, Tensor | None],
    bounds: Bounds, tiling: Tiling,
) -> None:  # fmt: skip
    (queries, heads, dim), sequences = output.shape, bounds.queries.numel() - 1
    lse, affine = rest
    overlap = affine is not None and overlaps(output.device, queries)
    with torch.cuda.device_of(output):
        _attention_forward[_grid(queries, sequences, heads, tiling)](
            *projections, output, lse, affine, bounds.queries, bounds.keys, sequences,
            0 if lse is None else lse.shape[1], *(part.stride(0) for part in projections),
            HEADS=heads, DIM=dim, BLOCK=tiling.block, STEP=tiling.step, OVERLAP=overlap, launch_pdl=overlap,
            num_warps=tiling.warps, num_stages=tiling.stages, maxnreg=tiling.registers,
        )  # fmt: skip


def backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Bounds], results: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor], tilings: Tilings | None = None,
) -> None:  # fmt: skip
    """Writes the gradients of query, key and value, from that of the attended values.

    `inputs` and `results` are `forward`'s; `gradients` are shaped like query, key and value, and may be slices of a
    tensor that joins them.
    """
    query, key, value, bounds = inputs
    output, lse = results
    query_grad, key_grad, value_grad = gradients
    _, heads, dim = query.shape
    delta = torch.empty_like(lse)
    q, k, v, do = map(_rows_together, (query, key, value, grad))
    places = (bounds.queries, bounds.keys, bounds.queries.numel() - 1, lse.shape[1])
    strides = (q.stride(0), k.stride(0), v.stride(0), do.stride(0))
    tilings = tilings or TILINGS[dim]
    with torch.cuda.device_of(query):
        tiling = tilings.query_gradient
        _query_gradient[_grid(query.shape[0], places[2], heads, tiling)](
            q, k, v, output, do, lse, delta, query_grad, *places, *strides, query_grad.stride(0),
            HEADS=heads, DIM=dim, BLOCK=tiling.block, STEP=tiling.step,
            num_warps=tiling.warps, num_stages=tiling.stages, maxnreg=tiling.registers,
        )  # fmt: skip
        tiling = tilings.key_value_gradients
        _key_value_gradients[_grid(key.shape[0], places[2], heads, tiling)](
            q, k, v, do, lse, delta, key_grad, value_grad, *places, *strides, key_grad.stride(0), value_grad.stride(0),
            HEADS=heads, DIM=dim, BLOCK=tiling.block, STEP=tiling.step,
            num_warps=tiling.warps, num_stages=tiling.stages, maxnreg=tiling.registers,
        )  # fmt: skip


def _grid(tokens: int, sequences: int, heads: int, tiling: Tiling) -> tuple[int]:
    # Heads vary fastest: neighbours in time are neighbours in memory.
    return ((tokens // tiling.block + sequences) * heads,)


def _rows_together(x: Tensor) -> Tensor:
    """`x` itself where a token's heads lie side by side, as in a slice of joined query, key and value; else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
