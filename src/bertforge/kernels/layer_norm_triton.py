"""LayerNorm(residual + dropout(x)), how both halves of a BERT layer end, as one Triton kernel forward and one backward.

Unfused, dropout, the sum and the norm each read and write all hidden states, and keep a mask besides. Here a row is
read once and held in registers: two reads and a write forward, two reads and two writes backward.

What backward needs of a row is (sum - mean) / deviation. A frozen norm keeps nothing for it but the deviation: the
output, which the next layer keeps anyway, gives it as (output - bias) / weight, as exactly as the sum rounded to
bfloat16 would (measured on all-MiniLM-L6-v2, every layer: 1.7e-3 against 1.7e-3, and gradients 1.5e-4 off where
rounding them costs 1.7e-3). Where a weight is almost zero nothing passes back through it, so zero will do. A trained
norm may not rely on that, for its weights' own gradients need the normalized values too: it keeps the sum.

Dropout is drawn again backward instead of being kept: a hash of (seed, row, column), the finalizer "lowbias32" with
Ellis' constants (https://github.com/skeeto/hash-prospector/issues/19), decides on a value. Philox, which torch uses,
takes ten rounds for the same and would need longer than the memory does.

For products in e4m3 (fp8.py) both write their result a second time in 8 bits: the output, or instead of x's gradient,
which then has a scale for each row.

Gradients of weight and bias are summed by each program over the rows it walks, then over programs by torch: always in
one order, so two runs are equal bit for bit. A frozen LayerNorm skips them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertforge.kernels.fp8 import ACTIVATION_SCALE, LARGEST, Fp8Rows
from bertforge.kernels.layer_norm import Norm, Sums

SMALLEST = tl.constexpr(1e-3)  # weights of a frozen norm below this pass nothing back
FP8_SCALE, FP8_LARGEST = tl.constexpr(ACTIVATION_SCALE), tl.constexpr(LARGEST)


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up."""

    rows: int
    """Rows a program holds at once."""
    warps: int


FORWARD = Tiling(4, 4)
BACKWARD = Tiling(4, 4)
BACKWARD_TRAINED = Tiling(2, 4)
FP8_BACKWARD = Tiling(2, 4)  # with 4 rows it takes 156 registers, and three programs fit on a multiprocessor, not four
PROGRAMS = 528  # backward: four for each multiprocessor of an H100


@triton.jit
def _mixed(x):
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _kept(seed, rows, columns, threshold):
    """Which values dropout leaves, `[rows, columns]`: those whose hash is not below `threshold` of 2^31."""
    own = _mixed(_mixed(rows.to(tl.uint32)) ^ tl.load(seed).to(tl.uint32))
    return (_mixed(own[:, None] ^ columns[None, :].to(tl.uint32)) >> 1).to(tl.int32) >= threshold


@triton.jit
def normalize(summed, columns, eps, WIDTH: tl.constexpr):
    """(sum - mean) / deviation `[rows, COLUMNS]`, and 1 / deviation `[rows]`."""
    centred = tl.where(columns[None, :] < WIDTH, summed - (tl.sum(summed, 1) / WIDTH)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return centred * scale[:, None], scale


@triton.jit
def _norm_forward(
    x, residual, weight, bias, seed, output, copied, kept, tokens, eps, threshold, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DROPOUT: tl.constexpr, TRAINED: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    exists = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
    summed = tl.load(x + places, mask=exists, other=0.0).to(tl.float32)
    if DROPOUT:
        summed = tl.where(_kept(seed, rows, columns, threshold), summed * scale, 0.0)
    summed += tl.load(residual + places, mask=exists, other=0.0).to(tl.float32)
    normalized, deviation = normalize(summed, columns, eps, WIDTH)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    y = normalized * w[None, :] + b[None, :]
    tl.store(output + places, y.to(output.dtype.element_ty), mask=exists)
    if FP8:
        y = tl.clamp(y * FP8_SCALE, -FP8_LARGEST, FP8_LARGEST)
        tl.store(copied + places, y.to(copied.dtype.element_ty), mask=exists)
    if TRAINED:
        tl.store(kept + places, summed.to(kept.dtype.element_ty), mask=exists)
    else:
        tl.store(kept + rows, deviation, mask=rows < tokens)


@triton.jit
def _norm_backward(
    output, kept, weight, bias, seed, grad, addend, addend_scale, sum_grad, x_grad, x_scale,
    weight_grads, bias_grads, x_sums,
    tokens, eps, threshold, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DROPOUT: tl.constexpr, TRAINED: tl.constexpr,
    ADDED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    inverse = tl.where(tl.abs(w) < SMALLEST, 0.0, 1 / w)
    dw = tl.zeros([COLUMNS], tl.float32)
    db = tl.zeros([COLUMNS], tl.float32)
    dx_sum = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
        exists = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
        if TRAINED:
            summed = tl.load(kept + places, mask=exists, other=0.0).to(tl.float32)
            normalized, deviation = normalize(summed, columns, eps, WIDTH)
        else:
            y = tl.load(output + places, mask=exists, other=0.0).to(tl.float32)
            normalized = tl.where(exists, (y - b[None, :]) * inverse[None, :], 0.0)
            deviation = tl.load(kept + rows, mask=rows < tokens, other=0.0)
        dy = tl.load(grad + places, mask=exists, other=0.0).to(tl.float32)
        if ADDED:
            own = tl.load(addend_scale + rows, mask=rows < tokens, other=0.0)
            dy += tl.load(addend + places, mask=exists, other=0.0).to(tl.float32) * own[:, None]
        dn = dy * w[None, :]
        along = tl.sum(dn * normalized, 1) / WIDTH
        ds = (dn - (tl.sum(dn, 1) / WIDTH)[:, None] - normalized * along[:, None]) * deviation[:, None]
        tl.store(sum_grad + places, ds.to(sum_grad.dtype.element_ty), mask=exists)
        dx = ds
        if DROPOUT:
            dx = tl.where(_kept(seed, rows, columns, threshold), ds * scale, 0.0)
        if FP8:
            own = tl.maximum(tl.max(tl.abs(dx), 1), 1e-30) / FP8_LARGEST
            tl.store(x_scale + rows, own, mask=rows < tokens)
            short = tl.clamp(dx * (1 / own)[:, None], -FP8_LARGEST, FP8_LARGEST)
            tl.store(x_grad + places, short.to(x_grad.dtype.element_ty), mask=exists)
        elif DROPOUT:
            tl.store(x_grad + places, dx.to(x_grad.dtype.element_ty), mask=exists)
        if TRAINED:
            dx_sum += tl.sum(tl.where(exists, dx, 0.0), 0)
            dw += tl.sum(dy * normalized, 0)
            db += tl.sum(dy, 0)
    if TRAINED:
        tl.store(weight_grads + tl.program_id(0) * WIDTH + columns, dw, mask=columns < WIDTH)
        tl.store(bias_grads + tl.program_id(0) * WIDTH + columns, db, mask=columns < WIDTH)
        tl.store(x_sums + tl.program_id(0) * WIDTH + columns, dx_sum, mask=columns < WIDTH)


def residual_layer_norm(
    x: Tensor, residual: Tensor, norm: Norm, tiling: Tiling = FORWARD, *, fp8: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor]]:
    """LayerNorm(residual + dropout(x)), shaped and typed as `x` `[tokens, hidden]`, and what backward needs of it.

    The first is written to `fp8` too, e4m3 `[tokens, hidden]`, where that is given. The second is the sum
    `[tokens, hidden]` when `norm` is trained, else 1 / deviation `[tokens]` float32.
    """
    tokens, width = x.shape
    output = torch.empty_like(x)
    kept = torch.empty_like(x) if norm.trained else torch.empty(tokens, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _norm_forward[(triton.cdiv(tokens, tiling.rows),)](
            x, residual, norm.weight, norm.bias, norm.seed, output, output if fp8 is None else fp8, kept,
            tokens, norm.eps, *_dropout(norm),
            WIDTH=width, COLUMNS=triton.next_power_of_2(width), ROWS=tiling.rows,
            DROPOUT=norm.dropout_p > 0, TRAINED=norm.trained, FP8=fp8 is not None, num_warps=tiling.warps,
        )  # fmt: skip
    return output, (kept,)


def residual_layer_norm_backward(
    grad: Tensor, output: Tensor, kept: tuple[Tensor], norm: Norm, tiling: Tiling | None = None,
    *, addend: tuple[Tensor, Tensor] | None = None, fp8: Fp8Rows | None = None,
) -> tuple[Tensor, Tensor, Sums]:  # fmt: skip
    """Gradients of `residual`, of `x`, and sums over tokens; `output` and `kept` are the forward pass's.

    The output's is `grad`, plus `addend` where that is given: values `[tokens, hidden]`, and a scale for each row. The
    second is written to `fp8` where that is given; else, without dropout, the first two are one tensor.
    """
    tokens, width = output.shape
    sum_grad = torch.empty_like(output)
    tiling = tiling or (BACKWARD_TRAINED if norm.trained else FP8_BACKWARD if fp8 else BACKWARD)
    x_grad = fp8.values if fp8 else torch.empty_like(output) if norm.dropout_p else sum_grad
    programs = min(PROGRAMS, triton.cdiv(tokens, tiling.rows))
    parts = torch.empty(3, programs if norm.trained else 0, width, dtype=torch.float32, device=output.device)
    with torch.cuda.device_of(output):
        _norm_backward[(programs,)](
            output, *kept, norm.weight, norm.bias, norm.seed, grad, *(addend or (grad, *kept)),
            sum_grad, x_grad, *((fp8.scale,) if fp8 else kept), *parts, tokens, norm.eps, *_dropout(norm),
            WIDTH=width, COLUMNS=triton.next_power_of_2(width), ROWS=tiling.rows,
            DROPOUT=norm.dropout_p > 0, TRAINED=norm.trained, ADDED=addend is not None, FP8=fp8 is not None,
            num_warps=tiling.warps,
        )  # fmt: skip
    return sum_grad, x_grad, Sums(*parts.sum(1)) if norm.trained else Sums()


def _dropout(norm: Norm) -> tuple[int, float]:
    """The hash below which a value is dropped, and what scales the others up."""
    return int(norm.dropout_p * 2**31), 1 / (1 - norm.dropout_p)
