"""LayerNorm(x + residual) as one Triton kernel forward and one backward.

Unfused, the sum is written and read again, and under autocast both it and the result are float32, which every linear
layer after it turns into bfloat16 anew. Here a row is read once and held in registers: two reads and a write forward,
three reads and a write backward (the sum and its statistics are made again from `x` and `residual`, so nothing is
kept for them). Sums are float32, the result has `x`'s dtype.

Gradients of weight and bias are summed by each program over the rows it walks, then over programs by torch: always in
one order, so two runs are equal bit for bit. A frozen LayerNorm skips them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up."""

    rows: int
    """Rows a program holds at once."""
    warps: int


FORWARD = Tiling(4, 4)
BACKWARD = Tiling(4, 4)
PROGRAMS = 528  # backward: four for each multiprocessor of an H100


@triton.jit
def _normalized(x, residual, rows, tokens, eps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows' places in memory, which of them exist, (sum - mean) / deviation `[rows, COLUMNS]`, 1 / deviation."""
    columns = tl.arange(0, COLUMNS)
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    exists = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
    summed = tl.load(x + places, mask=exists, other=0.0).to(tl.float32)
    summed += tl.load(residual + places, mask=exists, other=0.0).to(tl.float32)
    centred = tl.where(columns[None, :] < WIDTH, summed - (tl.sum(summed, 1) / WIDTH)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return places, exists, centred * scale[:, None], scale


@triton.jit
def _forward(
    x, residual, weight, bias, output, tokens, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places, exists, normalized, _ = _normalized(x, residual, rows, tokens, eps, WIDTH, COLUMNS)
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    values = normalized * w[None, :] + b[None, :]
    tl.store(output + places, values.to(output.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    x, residual, weight, grad, input_grad, weight_grads, bias_grads, tokens, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    dw = tl.zeros([COLUMNS], tl.float32)
    db = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        places, exists, normalized, scale = _normalized(x, residual, rows, tokens, eps, WIDTH, COLUMNS)
        dy = tl.load(grad + places, mask=exists, other=0.0).to(tl.float32)
        dn = dy * w[None, :]
        along = tl.sum(dn * normalized, 1) / WIDTH
        ds = (dn - (tl.sum(dn, 1) / WIDTH)[:, None] - normalized * along[:, None]) * scale[:, None]
        tl.store(input_grad + places, ds.to(input_grad.dtype.element_ty), mask=exists)
        if TRAINED:
            dw += tl.sum(dy * normalized, 0)
            db += tl.sum(dy, 0)
    if TRAINED:
        tl.store(weight_grads + tl.program_id(0) * WIDTH + columns, dw, mask=columns < WIDTH)
        tl.store(bias_grads + tl.program_id(0) * WIDTH + columns, db, mask=columns < WIDTH)


def forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, tiling: Tiling = FORWARD) -> Tensor:
    """LayerNorm(x + residual), shaped and typed as `x` `[..., hidden]`."""
    x, residual = x.contiguous(), residual.contiguous()
    output, width = torch.empty_like(x), x.shape[-1]
    tokens = x.numel() // width
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(tokens, tiling.rows),)](
            x, residual, weight, bias, output, tokens, eps,
            WIDTH=width, COLUMNS=triton.next_power_of_2(width), ROWS=tiling.rows, num_warps=tiling.warps,
        )  # fmt: skip
    return output


def backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], eps: float, trained: bool, tiling: Tiling = BACKWARD
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, of weight and of bias; `inputs` are x, residual, weight.

    The sum's gradient is that of `x` and of `residual`, in `x`'s dtype. Unless `trained`, the others are empty.
    """
    x, residual, weight = inputs
    x, residual, grad = x.contiguous(), residual.contiguous(), grad.contiguous()
    input_grad, width = torch.empty_like(x), x.shape[-1]
    tokens = x.numel() // width
    programs = min(PROGRAMS, triton.cdiv(tokens, tiling.rows))
    parts = torch.empty(2, programs if trained else 0, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward[(programs,)](
            x, residual, weight, grad, input_grad, *parts, tokens, eps,
            WIDTH=width, COLUMNS=triton.next_power_of_2(width), ROWS=tiling.rows, TRAINED=trained,
            num_warps=tiling.warps,
        )  # fmt: skip
    if not trained:
        return input_grad, weight.new_empty(0), weight.new_empty(0)
    weight_grad, bias_grad = parts.sum(1).to(weight.dtype)
    return input_grad, weight_grad.clone(), bias_grad.clone()  # an operator's results share no memory


@torch.library.custom_op("bertforge::residual_layer_norm", mutates_args=())
def fused_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`forward` as an operator that autograd, torch.compile and CUDA graphs take."""
    return forward(x, residual, weight, bias, eps)


@fused_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("bertforge::residual_layer_norm_backward", mutates_args=())
def fused_layer_norm_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` as an operator."""
    return backward(grad, (x, residual, weight), eps, trained)


@fused_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1] if trained else 0
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(width), weight.new_empty(width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[4]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, weight = ctx.saved_tensors
    trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    sum_grad, weight_grad, bias_grad = fused_layer_norm_backward(grad, x, residual, weight, ctx.eps, trained)
    own = (weight_grad, bias_grad) if trained else (None, None)
    return sum_grad, sum_grad.to(residual.dtype), *own, None


fused_layer_norm.register_autograd(_differentiate, setup_context=_save)
