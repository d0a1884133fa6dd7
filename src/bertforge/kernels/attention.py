"""Bidirectional attention over packed sequences: each token attends to its own sequence only.

Four implementations, equal up to rounding:

- attention_triton.py: our kernels for short sequences, forward and backward, for the head sizes in TRITON_HEAD_DIMS, on
  CUDA in half precision. `model.fused_layer` calls them; autograd does not.
- attention_cpu.py: the same by matrix products, for training on a CPU.
- `varlen`: torch's FlashAttention kernel for packed input, on CUDA in float16 and bfloat16, for all else. It has no
  dropout.
- `split`: scaled_dot_product_attention on one sequence after another; any device and dtype. On a CPU nothing is lost
  by the loop: a sequence fills the cores, and neither padding nor a mask is ever touched. On CUDA it serves float32,
  which FlashAttention does not take: for checking, not for speed.

A sequence's result depends on its own tokens alone, in `split` bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bertforge.errors import UsageError

# The head sizes for which our kernels beat torch's (benchmarks/attention.py measures both).
TRITON_HEAD_DIMS = frozenset({32, 64})


@dataclass(frozen=True, eq=False)
class Bounds:
    """Where the sequences of a pack begin; one tensor twice, unless only some tokens ask."""

    queries: Tensor
    """`cu_seqlens` of the queries, [sequences + 1] int32; the last entry is the number of queries."""
    keys: Tensor
    """`cu_seqlens` of keys and values, [sequences + 1] int32; the last entry is the number of tokens."""


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, max_seqlen: int, dropout_p: float = 0.0
) -> Tensor:
    """Attention of packed sequences: `query` and the result are `[queries, heads, head_dim]`.

    `key` and `value` are `[tokens, heads, head_dim]`. A sequence may be empty. Scores are scaled by 1 / sqrt(head_dim)
    (Vaswani et al. 2017, section 3.2.1). Raises UsageError for dropout where the kernel has none.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        if dropout_p:
            raise UsageError(
                f"the packed CUDA attention kernel has no dropout, but attention_dropout is {dropout_p}; "
                "set attention_dropout=0"
            )
        return _varlen(query, key, value, bounds, max_seqlen)
    if query.dtype is torch.bfloat16 and query.requires_grad:
        # torch's CPU kernel is quick in bfloat16 forward, but backward takes five times float32's time: half of a whole
        # training step (torch 2.13, a Xeon with AMX).
        with torch.autocast(query.device.type, enabled=False):
            return _split(query.float(), key.float(), value.float(), bounds, dropout_p).to(query.dtype)
    return _split(query, key, value, bounds, dropout_p)


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # It returns a tuple only when asked for auxiliary outputs.
    return cast(Tensor, varlen_attn(query, key, value, bounds.queries, bounds.keys, max_seqlen, max_seqlen))


def _split(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, dropout_p: float) -> Tensor:
    lengths = bounds.keys.diff().tolist()
    asked = lengths if bounds.queries is bounds.keys else bounds.queries.diff().tolist()
    # Splitting once costs one concatenation in the backward pass; slicing in the loop would cost a zero-filled
    # gradient of the whole pack for every sequence. The batch of one is there because torch's fused CPU kernel takes
    # four dimensions only: given three, it writes all scores out, three to eight times slower.
    outputs = [
        F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], dropout_p=dropout_p
        )  # [1, heads, length, head_dim]
        for q, k, v in zip(*map(torch.split, (query, key, value), (asked, lengths, lengths)), strict=True)
        if len(q)
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)  # [queries, heads, head_dim]
