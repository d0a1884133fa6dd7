"""A linear layer's product for inference, x W', with all that follows it while a tile lies in registers.

- `linear_activation`: (x W') * scale + bias, GELU, and the result as the next layer reads it: in bfloat16, or
  multiplied and rounded to 8 bits.
- `product`: x W' alone, in bfloat16. cuBLAS does that as well or better in bfloat16 and e4m3; of 8-bit integers it
  leaves 32-bit ones in memory, and writing them takes longer than multiplying.

Tiles, groups and descriptors are those of the training's product (linear_gelu_triton.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bertforge.kernels.linear_gelu_triton import Tiling, multiprocessors, place_of, tanh
from bertforge.kernels.overlap_triton import fetch, overlaps, wait_for_inputs
from bertforge.kernels.rounding_triton import rounded_to


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    if ACTIVATION == "tanh":
        return tanh(x)
    half = 0.5 * x
    if ACTIVATION == "gelu":  # as `linear_gelu_triton._gelu`
        square = tl.minimum(x * x, 50.0)
        return half + half * tanh(x * (0.79750758 + square * (0.03700600 + square * -0.00035159)))
    # "gelu_new" and "gelu_pytorch_tanh": Hendrycks & Gimpel's approximation, sqrt(2 / pi) (x + 0.044715 x^3).
    return half + half * tanh(x * (0.79788456 + x * x * 0.03567741))


@triton.jit
def _finish(
    values, scale, bias, multiplier, output, row, column, width, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr
):
    values = values.to(tl.float32)
    if ACTIVATION != "":
        columns = column + tl.arange(0, COLUMNS)
        inside = columns < width
        if scale is not None:
            values *= tl.load(scale + columns, mask=inside, other=0.0)[None, :]
        values = _activated(values + tl.load(bias + columns, mask=inside, other=0.0)[None, :], ACTIVATION)
        if multiplier is not None:
            values *= tl.load(multiplier + columns, mask=inside, other=0.0)[None, :]
    output.store([row, column], rounded_to(values, output.dtype))


@triton.jit
def _product(
    x, weight, weights, scale, bias, multiplier, output, tokens, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    INTEGERS: tl.constexpr, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(width, COLUMNS)
    if OVERLAP:
        row, column = place_of(tl.program_id(0), down, across, ROWS, COLUMNS, GROUP)
        fetch(weights + column * depth, depth, width - column, depth, COLUMNS, DEPTH)
    wait_for_inputs(OVERLAP)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        row, column = place_of(tile, down, across, ROWS, COLUMNS, GROUP)
        total = tl.zeros((ROWS, COLUMNS), tl.int32 if INTEGERS else tl.float32)
        for step in range(tl.cdiv(depth, DEPTH)):
            a = x.load([row, step * DEPTH])  # [ROWS, DEPTH]
            b = weight.load([column, step * DEPTH]).T  # [DEPTH, COLUMNS]
            total = tl.dot(a, b, total, out_dtype=tl.int32 if INTEGERS else tl.float32)
        if PARTS == 2:  # a tile in float32 and what is made of it do not fit into the registers together
            half: tl.constexpr = COLUMNS // 2
            left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, half)), (0, 2, 1)))
            _finish(left, scale, bias, multiplier, output, row, column, width, half, ACTIVATION)
            _finish(right, scale, bias, multiplier, output, row, column + half, width, half, ACTIVATION)
        else:
            _finish(total, scale, bias, multiplier, output, row, column, width, COLUMNS, ACTIVATION)


def product(x: Tensor, weight: Tensor, output: Tensor, tiling: Tiling) -> None:
    """Writes x weight' into `output` `[tokens, out]`; `x` is `[tokens, in]`, `weight` `[out, in]`, of one type."""
    _launch(x, weight, (None, None, None), output, "", tiling)


def linear_activation(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, multiplier: Tensor | None, output: Tensor,
    activation: str, tiling: Tiling,
) -> None:  # fmt: skip
    """Writes activation(x weight' * scale + bias) into `output` `[tokens, out]`, times `multiplier` where there is one.

    `scale`, `bias` and `multiplier` are `[out]` float32, None for 1; `activation` is tanh or one of
    `BertConfig.hidden_act`.
    """
    _launch(x, weight, (scale, bias, multiplier), output, activation, tiling)


def _launch(
    x: Tensor, weight: Tensor, vectors: tuple[Tensor | None, ...], output: Tensor, activation: str, tiling: Tiling
) -> None:
    (tokens, depth), width = x.shape, weight.shape[0]
    parts, overlap = 2 if tiling.columns > 128 else 1, overlaps(x.device, tokens)
    tiles = triton.cdiv(tokens, tiling.rows) * triton.cdiv(width, tiling.columns)
    with torch.cuda.device_of(x):
        _product[(min(tiles, tiling.programs * multiprocessors(x.device)),)](
            TensorDescriptor.from_tensor(x, [tiling.rows, tiling.depth]),
            TensorDescriptor.from_tensor(weight, [tiling.columns, tiling.depth]), weight,
            *vectors, TensorDescriptor.from_tensor(output, [tiling.rows, tiling.columns // parts]),
            tokens, width, depth, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, GROUP=tiling.group,
            PARTS=parts, INTEGERS=x.dtype == torch.int8, ACTIVATION=activation,
            OVERLAP=overlap, launch_pdl=overlap,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
