"""Embeddings, encoder and pooler: a batch in, every token's vector and one pooled vector a sequence out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bertforge.batch import LowerLayers, PackedBatch, PaddedBatch
from bertforge.errors import UsageError
from bertforge.model.attention import AttentionCore, PackedCore, PaddedCore
from bertforge.model.config import BertConfig
from bertforge.model.embeddings import BertEmbeddings
from bertforge.model.encoder import BertEncoder


class BertPooler(nn.Module):
    """tanh(dense([CLS])), from next-sentence prediction (Devlin et al. 2018, section 3.1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """`[sequences, hidden]`, each sequence's first token -> `[sequences, hidden]`."""
        return torch.tanh(self.dense(first))


class BertModel(nn.Module):
    """The encoder of one checkpoint; the type of the batch chooses the attention core."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)

    def forward(self, batch: PaddedBatch | PackedBatch) -> tuple[Tensor, Tensor]:
        """Hidden states `[batch, seq, hidden]` or `[tokens, hidden]`, and pooled `[sequences, hidden]`.

        A padded batch is read as transformers reads it: positions count from the left edge and the pooled token is the
        first column. Pad on the right, or `pack` the batch, when that column may be padding.
        Raises UsageError when a sequence is longer than the checkpoint's positions.
        """
        core: AttentionCore
        if isinstance(batch, PackedBatch):
            longest, positions = batch.max_seqlen, batch.position_ids  # [tokens]
            core = PackedCore(batch.cu_seqlens, batch.max_seqlen)
        else:
            longest = batch.input_ids.shape[1]
            positions = torch.arange(longest, device=batch.input_ids.device)  # [seq]
            core = PaddedCore(batch.attention_mask)
        if longest > self.config.max_position_embeddings:
            raise UsageError(
                f"a sequence has {longest} tokens, but this model holds {self.config.max_position_embeddings}; "
                f"truncate to max_length={self.config.max_position_embeddings}"
            )
        if isinstance(batch, PackedBatch) and batch.lower is not None:
            hidden = self.encoder(batch.lower.hidden, core, batch.lower.layers)
        else:
            hidden = self.embeddings(batch.input_ids, positions, batch.token_type_ids)
            hidden = self.encoder(hidden, core)
        if isinstance(batch, PackedBatch):
            # An empty sequence at the end would start one past the last token.
            first = hidden[batch.cu_seqlens[:-1].clamp_max(len(hidden) - 1)]  # [sequences, hidden]
        else:
            first = hidden[:, 0]
        return hidden, self.pooler(first)

    def lower_layers(self, batch: PackedBatch, layers: int) -> LowerLayers:
        """The embeddings and the lowest `layers` layers alone, for a batch to bring with it."""
        hidden = self.embeddings(batch.input_ids, batch.position_ids, batch.token_type_ids)
        core = PackedCore(batch.cu_seqlens, batch.max_seqlen)
        return LowerLayers(self.encoder(hidden, core, 0, layers), layers)
