"""The two places where a BERT normalises, for inference: after the embeddings, and where a residual branch ends.

A row is read once, normalised in registers and written once or twice: in bfloat16 for the residual, and as the product
that follows reads it, multiplied and rounded to 8 bits. The branch's product comes without its scale and bias; both are
applied here, where the row is read anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertforge.kernels.layer_norm_triton import normalize
from bertforge.kernels.overlap_triton import overlaps, wait_for_inputs
from bertforge.kernels.rounding_triton import rounded_to

SPREAD_UP_TO = 4096  # tokens up to which a row is spread over many threads, for there are more than enough


@triton.jit
def _write(
    summed, weight, bias, multiplier, output, short, places, exists, columns, eps,
    WIDTH: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    values, _ = normalize(summed, columns, eps, WIDTH)
    inside = columns < WIDTH
    w = tl.load(weight + columns, mask=inside, other=0.0)
    values = values * w[None, :] + tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    tl.store(output + places, values.to(output.dtype.element_ty), mask=exists)
    if SHORT:
        values *= tl.load(multiplier + columns, mask=inside, other=0.0)[None, :]
        tl.store(short + places, rounded_to(values, short.dtype.element_ty), mask=exists)


@triton.jit
def _embed(
    ids, positions, words, places_table, weight, bias, multiplier, output, short, tokens, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exists = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
    word = tl.load(ids + rows, mask=rows < tokens, other=0).to(tl.int64)
    place = tl.load(positions + rows, mask=rows < tokens, other=0)
    summed = tl.load(words + word[:, None] * WIDTH + columns[None, :], mask=exists, other=0.0).to(tl.float32)
    summed += tl.load(places_table + place[:, None] * WIDTH + columns[None, :], mask=exists, other=0.0).to(tl.float32)
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    _write(summed, weight, bias, multiplier, output, short, places, exists, columns, eps, WIDTH, SHORT)


@triton.jit
def _residual_norm(
    x, scale, shift, residual, weight, bias, multiplier, output, short, tokens, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    exists = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
    inside = columns < WIDTH
    summed = tl.load(x + places, mask=exists, other=0.0).to(tl.float32)
    if scale is not None:
        summed = summed * tl.load(scale + columns, mask=inside, other=0.0)[None, :]
    summed += tl.load(shift + columns, mask=inside, other=0.0)[None, :]
    summed += tl.load(residual + places, mask=exists, other=0.0).to(tl.float32)
    _write(summed, weight, bias, multiplier, output, short, places, exists, columns, eps, WIDTH, SHORT)


def embed(
    ids: Tensor, positions: Tensor, words: Tensor, places: Tensor, norm: tuple[Tensor, Tensor, float],
    output: Tensor, multiplier: Tensor | None, short: Tensor | None,
) -> None:  # fmt: skip
    """Writes LayerNorm(words[ids] + places[positions]) into `output` `[tokens, hidden]`, and rounded into `short`.

    What is rounded is the result times `multiplier` `[hidden]` float32, to the type of `short` `[tokens, hidden]`.
    `ids` and `positions` are `[tokens]` int32, `words` `[vocabulary, hidden]`, `places` `[positions, hidden]`, a
    position's embedding and the token type's; `norm` is weight and bias `[hidden]` float32 and eps.
    """
    _launch(_embed, (ids, positions, words, places), norm, output, multiplier, short)


def residual_norm(
    x: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor, float],
    output: Tensor, multiplier: Tensor | None, short: Tensor | None,
) -> None:  # fmt: skip
    """Writes LayerNorm(x * scale + shift + residual) into `output` `[tokens, hidden]`, and rounded into `short`.

    `x` and `residual` are `[tokens, hidden]`; `output` may be `residual`. `scale`, None for 1, and `shift` are
    `[hidden]` float32; for the rest see `embed`.
    """
    _launch(_residual_norm, (x, scale, shift, residual), norm, output, multiplier, short)


def _launch(
    kernel: triton.JITFunction, inputs: tuple[Tensor | None, ...], norm: tuple[Tensor, Tensor, float],
    output: Tensor, multiplier: Tensor | None, short: Tensor | None,
) -> None:  # fmt: skip
    (tokens, width), (weight, bias, eps) = output.shape, norm
    overlap = overlaps(output.device, tokens)
    # 65,536 rows of 768, H200: one row a warp 77 us, four rows in four warps 86; with 8 bits beside it 150 and 106.
    rows, warps = (1, 8) if tokens <= SPREAD_UP_TO else (1, 1) if short is None else (4, 4)
    with torch.cuda.device_of(output):
        kernel[(triton.cdiv(tokens, rows),)](
            *inputs, weight, bias, multiplier, output, short, tokens, eps,
            WIDTH=width, COLUMNS=triton.next_power_of_2(width), ROWS=rows, SHORT=short is not None,
            OVERLAP=overlap, launch_pdl=overlap, num_warps=warps,
        )  # fmt: skip
