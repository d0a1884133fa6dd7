"""The widening half of a feed-forward, GELU(x W' + b), and its backward pass: GELU inside the matrix products.

The activations between the two layers of a feed-forward are the widest there are, and GELU apart would read and write
them once more in each direction. Here it is worked out while a tile of the product lies in registers. That leaves the
matrix units idle for as long, so a product takes 290 to 360 us at BERT-base's shapes on an H100 where cuBLAS' alone
takes 230 to 260, but saves more than that in memory traffic.

Backward needs GELU's slope at every value, x's normal distribution function plus x times its density. It lies between
-0.13 and 1.13, so it is kept in a byte, to 0.0025, where bfloat16 rounds the product with it to 0.004 of itself anyway;
zero is exact. That is half of the memory that keeping x would take.

With operands in e4m3 (fp8.py) the activations and the gradient come out in e4m3 too: half of the memory traffic, and
nobody converts them. Both operands are then read along what is summed over, as such products demand.

Programs walk over the tiles of the result, as many programs as multiprocessors, so that the loads of one tile are under
way while another is stored. Operands come through tensor descriptors (the copy engine of Hopper and later), which fill
what lies outside with zeros.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bertforge.kernels.fp8 import ACTIVATION_SCALE, LARGEST, Fp8Rows, Fp8Weight

FP8_SCALE, FP8_LARGEST = tl.constexpr(ACTIVATION_SCALE), tl.constexpr(LARGEST)
STEPS = tl.constexpr(200.0)  # of a slope, to the unit
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
ZERO = tl.constexpr(26.0)  # the byte that means 0: the range is -0.13 to 1.145


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up."""

    rows: int
    columns: int
    depth: int
    """Of a step."""
    group: int
    """Tiles of rows that share the columns' operand while it is in the cache."""
    warps: int
    stages: int
    """Steps whose loads are in flight."""
    programs: int
    """On a multiprocessor at a time."""


TILING = Tiling(128, 256, 64, 8, 8, 3, 1)
FP8_TILING = Tiling(128, 128, 128, 8, 8, 3, 2)  # operands of half the size: two programs fit, one stores meanwhile


@triton.jit
def tanh(x):
    """The hardware's, one instruction: 2^-11 off at most, a quarter of what bfloat16 rounds to."""
    if COMPILED:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _gelu(x):
    """GELU(x), x times the normal distribution function (Hendrycks & Gimpel 2016), and its slope.

    That function is taken as (1 + tanh(x P(x^2))) / 2, with P fitted so that GELU is within 3e-5 of the exact one and
    its slope within 1.2e-4; the hardware's tanh adds 2.5e-4 times x at most. With a series for the error function a
    value takes 33 instructions, with the logistic function written out 24 (17 without the slope), and the matrix units
    wait for each.
    """
    square = tl.minimum(x * x, 50.0)  # beyond, P would turn back, and all is decided
    share = 0.5 + 0.5 * tanh(x * (0.79750758 + square * (0.03700600 + square * -0.00035159)))
    value = x * share
    return value, share + (value - value * share) * (1.59501517 + square * (0.22203597 + square * -0.00351592))


@triton.jit
def _finish(
    values, bias, scale, growth, output, slope, sums, row, column, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """GELU of `values` plus bias, its slope kept ("keep") or not ("forget"); or `values` times it ("slope").

    "slope, sums" also leaves the sums of the tile's columns: added up, the bias's gradient. With FP8, `values` are
    those of e4m3 numbers, and so is what is stored.
    """
    if FP8:
        values *= tl.load(scale) / (tl.load(growth) if EPILOGUE == "slope" else FP8_SCALE)
    columns = column + tl.arange(0, COLUMNS)
    if EPILOGUE == "slope" or EPILOGUE == "slope, sums":
        code = slope.load([row, column]).to(tl.float32)
        values = values * (code - ZERO) * (1.0 / STEPS)
        if EPILOGUE == "slope, sums":
            tl.store(sums + row // ROWS * width + columns, tl.sum(values, 0), mask=columns < width)
    else:
        b = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
        values += b[None, :]
        values, steep = _gelu(values)
        if EPILOGUE == "keep":
            # From 2^23 on float32 holds whole numbers alone: adding it rounds, and leaves the code in the lowest byte.
            code = (steep * STEPS + (ZERO + 8388608.0)).to(tl.int32, bitcast=True)
            slope.store([row, column], code.to(tl.uint8))
        if FP8:
            values = tl.minimum(values * FP8_SCALE, FP8_LARGEST)
    output.store([row, column], values.to(output.dtype))


@triton.jit
def place_of(tile, down, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of a tile: GROUP tiles down, then one to the right: operands stay in the cache."""
    first = tile // (GROUP * across) * GROUP
    group = min(down - first, GROUP)
    return (first + tile % (GROUP * across) % group) * ROWS, tile % (GROUP * across) // group * COLUMNS


@triton.jit
def _product(
    x, weight, bias, scale, growth, output, slope, sums, tokens, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(width, COLUMNS)
    half: tl.constexpr = COLUMNS // 2
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        row, column = place_of(tile, down, across, ROWS, COLUMNS, GROUP)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(tl.cdiv(depth, DEPTH)):
            a = x.load([row, step * DEPTH])  # [ROWS, DEPTH]
            if TRANSPOSED:  # noqa: SIM108  # the branches have other shapes
                b = weight.load([column, step * DEPTH]).T  # [DEPTH, COLUMNS]
            else:
                b = weight.load([step * DEPTH, column])
            total = tl.dot(a, b, total)
        # By halves: a tile in float32 and what is made of it do not fit into the registers together.
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, half)), (0, 2, 1)))
        _finish(left, bias, scale, growth, output, slope, sums, row, column, width, ROWS, half, EPILOGUE, FP8)
        _finish(right, bias, scale, growth, output, slope, sums, row, column + half, width, ROWS, half, EPILOGUE, FP8)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, keep: bool, tiling: Tiling = TILING
) -> tuple[Tensor, Tensor | None]:
    """GELU(x weight' + bias) `[tokens, out]`, and its slope for `linear_gelu_backward`, uint8, None unless `keep`.

    `x` is `[tokens, in]`, `weight` `[out, in]`; both widths are multiples of 16.
    """
    output = x.new_empty(x.shape[0], weight.shape[0])
    slope = torch.empty(output.shape, dtype=torch.uint8, device=x.device) if keep else None
    _launch((x, weight, bias), output, slope, None, "keep" if keep else "forget", tiling)
    return output, slope


def linear_gelu_backward(
    grad: Tensor, weight: Tensor, slope: Tensor, *, sums: bool, tiling: Tiling = TILING
) -> tuple[Tensor, Tensor | None]:
    """The gradient before GELU `[tokens, intermediate]`, and with `sums` that of `linear_gelu`'s bias, float32.

    `grad` is that of the layer after GELU, `[tokens, out]`, and `weight` that layer's, `[out, intermediate]`; the
    result is grad weight * slope.
    """
    output = grad.new_empty(slope.shape)
    blocks = triton.cdiv(len(grad), tiling.rows) if sums else 0
    parts = torch.empty(blocks, slope.shape[1], dtype=torch.float32, device=grad.device)
    _launch((grad, weight, None), output, slope, parts, "slope, sums" if sums else "slope", tiling)
    return output, parts.sum(0) if sums else None


def linear_gelu_fp8(
    x: Tensor, weight: Fp8Weight, bias: Tensor, *, keep: bool, tiling: Tiling = FP8_TILING
) -> tuple[Tensor, Tensor | None]:
    """`linear_gelu` from activations in e4m3 `[tokens, in]` to such `[tokens, out]`, both ACTIVATION_SCALE as large."""
    output = x.new_empty(x.shape[0], weight.rows.shape[0])
    slope = torch.empty(output.shape, dtype=torch.uint8, device=x.device) if keep else None
    _launch((x, weight.rows, bias), output, slope, None, "keep" if keep else "forget", tiling, weight)
    return output, slope


def linear_gelu_fp8_backward(grad: Fp8Rows, weight: Fp8Weight, slope: Tensor, tiling: Tiling = FP8_TILING) -> Tensor:
    """`linear_gelu_backward` in e4m3: what it gives is this times grad.scale * weight.growth.

    That is a bound, for a program sees no row whole.
    """
    output = grad.values.new_empty(slope.shape)
    _launch((grad.values, weight.columns, None), output, slope, None, "slope", tiling, weight)
    return output


def _launch(
    operands: tuple[Tensor, Tensor, Tensor | None], output: Tensor, slope: Tensor | None, sums: Tensor | None,
    epilogue: str, tiling: Tiling, fp8: Fp8Weight | None = None,
) -> None:  # fmt: skip
    x, weight, bias = operands
    (tokens, depth), width = x.shape, output.shape[1]
    transposed = bias is not None or fp8 is not None
    half = [tiling.rows, tiling.columns // 2]
    tile = [tiling.columns, tiling.depth] if transposed else [tiling.depth, tiling.columns]
    tiles = triton.cdiv(tokens, tiling.rows) * triton.cdiv(width, tiling.columns)
    with torch.cuda.device_of(x):
        _product[(min(tiles, tiling.programs * multiprocessors(x.device)),)](
            TensorDescriptor.from_tensor(x, [tiling.rows, tiling.depth]), TensorDescriptor.from_tensor(weight, tile),
            bias, *((fp8.scale, fp8.growth) if fp8 else (None, None)), TensorDescriptor.from_tensor(output, half),
            None if slope is None else TensorDescriptor.from_tensor(slope, half), sums,
            tokens, width, depth, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, GROUP=tiling.group,
            TRANSPOSED=transposed, EPILOGUE=epilogue, FP8=fp8 is not None,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
