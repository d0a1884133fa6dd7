"""Word, position and token-type embeddings, summed and normalised; for any shape of ids."""

from __future__ import annotations

from torch import Tensor, nn

from bertforge.model.config import BertConfig


class BertEmbeddings(nn.Module):
    """`[...]` ids -> `[..., hidden]`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """`position_ids` broadcasts against `input_ids`; `token_type_ids` None means all zero."""
        # One row for all tokens when every type is 0: the same sum, without a gather.
        token_types = (
            self.token_type_embeddings.weight[0]
            if token_type_ids is None
            else self.token_type_embeddings(token_type_ids)
        )
        hidden = self.word_embeddings(input_ids) + token_types + self.position_embeddings(position_ids)
        normed: Tensor = self.dropout(self.LayerNorm(hidden))  # [..., hidden]
        return normed
