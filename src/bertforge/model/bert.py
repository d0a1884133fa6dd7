"""Embeddings, encoder and pooler: a batch in, every token's vector and one pooled vector a sequence out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bertforge.batch import LowerLayers, PackedBatch, PaddedBatch
from bertforge.errors import UsageError
from bertforge.kernels.attention import Bounds
from bertforge.model.attention import Core, PackedCore, PaddedCore
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

        See `_begun` for what a batch may hold.
        """
        hidden, core, done = self._begun(batch)
        hidden = self.encoder(hidden, core, done)
        _, first = core.first(hidden)
        return hidden, self.pooler(first.reshape(-1, hidden.shape[-1]))

    def pooled(self, batch: PaddedBatch | PackedBatch) -> Tensor:
        """The second result of `forward` alone, for less: the last layer works on first tokens only."""
        pooled: Tensor = self.pooler(self.first(batch))
        return pooled

    def first(self, batch: PaddedBatch | PackedBatch) -> Tensor:
        """The last layer's output for each sequence's first token, `[sequences, hidden]`: what the pooler reads."""
        hidden, core, done = self._begun(batch)
        first = self.encoder.first(hidden, core, done)  # [sequences, hidden] or [batch, 1, hidden]
        return first.reshape(-1, hidden.shape[-1])

    def lower_layers(self, batch: PackedBatch, layers: int) -> LowerLayers:
        """The embeddings and the lowest `layers` layers alone, for a batch to bring with it."""
        hidden, core, done = self._begun(batch)
        return LowerLayers(self.encoder(hidden, core, done, layers), layers)

    def _begun(self, batch: PaddedBatch | PackedBatch) -> tuple[Tensor, Core, int]:
        """Hidden states, the core that knows the sequences' bounds, and how many layers the states have behind them.

        None, and the states are the embeddings' output, unless the batch brings what its lower layers gave.

        A padded batch is read as transformers reads it: positions count from the left edge and the pooled token is the
        first column. Pad on the right, or `pack` the batch, when that column may be padding.
        Raises UsageError when a sequence is longer than the checkpoint's positions.
        """
        core: Core
        if isinstance(batch, PackedBatch):
            longest, positions = batch.max_seqlen, batch.position_ids  # [tokens]
            core = PackedCore(Bounds(batch.cu_seqlens, batch.cu_seqlens), batch.max_seqlen)
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
            return batch.lower.hidden, core, batch.lower.layers
        return self.embeddings(batch.input_ids, positions, batch.token_type_ids), core, 0
