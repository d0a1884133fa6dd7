"""W + scaling B A, rounded once, and the gradients of A and B: a Triton kernel each.

Torch needs half a dozen small kernels for either, some 60 microseconds a layer on an H100, which is mostly the time
between them. The gradients are those of the products: dB = scaling dW A' and dA = scaling B' dW. Programs own rows of
dB or columns of dA and walk over dW, so nothing is added up between them and two runs are equal bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 16  # rows of B, or columns of A, that a program owns: few, so that there are programs enough
STEP = 128
WARPS = 4


@triton.jit
def _adapted(weight, a, b, output, rows, columns, scaling, R: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
             STEP: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    rank = tl.arange(0, RANKS)
    left = tl.load(b + row[:, None] * R + rank, mask=(row[:, None] < rows) & (rank < R), other=0.0)  # [BLOCK, RANKS]
    right = tl.load(
        a + rank[:, None] * columns + column, mask=(rank[:, None] < R) & (column < columns), other=0.0
    )  # [RANKS, STEP]
    places = row[:, None] * columns + column
    inside = (row[:, None] < rows) & (column < columns)
    update = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    values = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32) + update * scaling
    tl.store(output + places, values.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _b_gradient(grad, a, b_grad, rows, columns, scaling, R: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
                STEP: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANKS)
    total = tl.zeros([BLOCK, RANKS], tl.float32)
    for start in range(0, columns, STEP):
        column = start + tl.arange(0, STEP)
        inside = (row[:, None] < rows) & (column < columns)
        dw = tl.load(grad + row[:, None] * columns + column, mask=inside, other=0.0)  # [BLOCK, STEP]
        right = tl.load(a + rank[:, None] * columns + column, mask=(rank[:, None] < R) & (column < columns), other=0.0)
        total = tl.dot(dw.to(tl.float32), tl.trans(right.to(tl.float32)), total, input_precision="ieee")
    places = b_grad + row[:, None] * R + rank
    tl.store(places, (total * scaling).to(b_grad.dtype.element_ty), mask=(row[:, None] < rows) & (rank < R))


@triton.jit
def _a_gradient(grad, b, a_grad, rows, columns, scaling, R: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
                STEP: tl.constexpr):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANKS)
    total = tl.zeros([RANKS, BLOCK], tl.float32)
    for start in range(0, rows, STEP):
        row = start + tl.arange(0, STEP)
        inside = (row[:, None] < rows) & (column < columns)
        dw = tl.load(grad + row[:, None] * columns + column, mask=inside, other=0.0)  # [STEP, BLOCK]
        left = tl.load(b + row * R + rank[:, None], mask=(row < rows) & (rank[:, None] < R), other=0.0)
        total = tl.dot(left.to(tl.float32), dw.to(tl.float32), total, input_precision="ieee")
    places = a_grad + rank[:, None] * columns + column
    tl.store(places, (total * scaling).to(a_grad.dtype.element_ty), mask=(rank[:, None] < R) & (column < columns))


class AdaptedWeight(torch.autograd.Function):
    """See `low_rank.adapted_weight`; the frozen weight itself gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        assert not ctx.needs_input_grad[0], "the adapted weight is frozen"
        weight, lora_A, lora_B = weight.contiguous(), lora_A.contiguous(), lora_B.contiguous()
        (rows, columns), rank = weight.shape, lora_A.shape[0]
        output = torch.empty(rows, columns, dtype=dtype, device=weight.device)
        with torch.cuda.device_of(weight):
            _adapted[(triton.cdiv(rows, BLOCK), triton.cdiv(columns, STEP))](
                weight, lora_A, lora_B, output, rows, columns, scaling,
                R=rank, RANKS=_padded(rank), BLOCK=BLOCK, STEP=STEP, num_warps=WARPS,
            )  # fmt: skip
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lora_A, lora_B = ctx.saved_tensors
        grad = grads[0].contiguous()
        (rows, columns), rank = grad.shape, lora_A.shape[0]
        a_grad, b_grad = torch.empty_like(lora_A), torch.empty_like(lora_B)
        shape = (rows, columns, ctx.scaling)
        options = {"R": rank, "RANKS": _padded(rank), "BLOCK": BLOCK, "STEP": STEP, "num_warps": WARPS}
        with torch.cuda.device_of(grad):
            _b_gradient[(triton.cdiv(rows, BLOCK),)](grad, lora_A, b_grad, *shape, **options)
            _a_gradient[(triton.cdiv(columns, BLOCK),)](grad, lora_B, a_grad, *shape, **options)
        return None, a_grad, b_grad, None, None


def _padded(rank: int) -> int:
    """What a product of Triton's takes: a power of two, 16 or more."""
    return max(16, int(triton.next_power_of_2(rank)))
