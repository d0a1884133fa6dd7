"""Self-attention: one class of projections, and two cores that know where sequences begin and end.

A core maps query, key and value to the attended values, all shaped like the batch: `[batch, seq, heads, head_dim]` or
`[tokens, heads, head_dim]`. It is made once per batch and shared by all layers, so the mask or the boundaries are
worked out once. Where only some tokens ask, as the first of each sequence in the last layer, they come as `queries`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertforge.kernels.attention import Bounds, varlen_attention
from bertforge.model.config import BertConfig


class AttentionCore(Protocol):
    """softmax(query key^T / sqrt(head_dim)) value within each sequence; `[..., heads, head_dim]` in and out."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor: ...


class PaddedCore:
    """Attention over `[batch, seq, heads, head_dim]` that leaves padding out."""

    def __init__(self, attention_mask: Tensor) -> None:
        """`attention_mask` is `[batch, seq]`, nonzero where a token is real."""
        self.mask = attention_mask.bool()[:, None, None, :]  # [batch, 1, 1, seq]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=self.mask, dropout_p=dropout_p
        )  # [batch, heads, seq, head_dim]
        return attended.transpose(1, 2)

    def first(self, hidden: Tensor) -> tuple[PaddedCore, Tensor]:
        """The core for one query a sequence, and the first tokens, `[batch, 1, hidden]`, that ask."""
        return self, hidden[:, :1]


class PackedCore:
    """Attention over `[tokens, heads, head_dim]` within the bounds of `cu_seqlens`."""

    def __init__(self, bounds: Bounds, max_seqlen: int) -> None:
        self.bounds = bounds
        self.max_seqlen = max_seqlen

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        return varlen_attention(query, key, value, self.bounds, self.max_seqlen, dropout_p)

    def first(self, hidden: Tensor) -> tuple[PackedCore, Tensor]:
        """The core for one query a sequence, and the first tokens, `[sequences, hidden]`, that ask."""
        starts = self.bounds.keys
        each = torch.arange(len(starts), dtype=torch.int32, device=starts.device)  # [sequences + 1]
        # An empty sequence at the end would start one past the last token.
        first = hidden[starts[:-1].clamp_max(len(hidden) - 1)]  # [sequences, hidden]
        return PackedCore(Bounds(each, starts), self.max_seqlen), first


Core = PaddedCore | PackedCore


class BertSelfAttention(nn.Module):
    """The query, key and value projections around a core."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = (config.num_attention_heads, config.head_dim)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_p = config.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, core: AttentionCore, queries: Tensor) -> Tensor:
        """`hidden` `[..., hidden]`, and those of it that ask -> one row for each of `queries`."""
        query = self.query(queries).unflatten(-1, self.heads)  # [..., heads, head_dim]
        key = self.key(hidden).unflatten(-1, self.heads)
        value = self.value(hidden).unflatten(-1, self.heads)
        attended = core(query, key, value, self.dropout_p if self.training else 0.0)
        return attended.flatten(-2)  # [..., hidden]


class BertAttention(nn.Module):
    """Self-attention, its output projection, and the residual."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, core: AttentionCore, queries: Tensor) -> Tensor:
        """See `BertSelfAttention`."""
        attended: Tensor = self.output(self.self(hidden, core, queries), queries)
        return attended


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(x))): how both halves of a BERT layer end (post-norm)."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`x [..., in_features]`, `residual [..., hidden]` -> `[..., hidden]`."""
        normed: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return normed
