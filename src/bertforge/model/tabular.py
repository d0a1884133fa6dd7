"""The branch that reads columns beside the text.

Numeric columns come in scaled; a piecewise-linear encoding turns each into how far it lies through each of its bins,
bounded by quantiles of the training rows (Gorishniy et al. 2022, arXiv 2203.05556, section 3.2), so that a small
network can bend at thresholds as a decision tree does. Categorical columns are embedded, a multi-valued column is the
mean of its values' embeddings, and two hidden layers mix it all. With `hidden_size = 0` the scaled numbers themselves
join the text's vector: the study's model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bertforge.batch import TabularBatch
from bertforge.model.config import TabularConfig


class PiecewiseLinear(nn.Module):
    """Each value becomes `bins` numbers: 1 for a bin below it, 0 for one above, the fraction within its own."""

    edges: Tensor  # [numeric, bins + 1], ascending; set by training from quantiles

    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        edges = torch.linspace(-1, 1, config.bins + 1).repeat(config.numeric, 1)
        self.register_buffer("edges", edges)
        # One small linear layer per column: [numeric, bins, embedding].
        self.weight = nn.Parameter(torch.empty(config.numeric, config.bins, config.embedding_size))
        self.bias = nn.Parameter(torch.zeros(config.numeric, config.embedding_size))
        nn.init.uniform_(self.weight, -(config.bins**-0.5), config.bins**-0.5)

    def forward(self, numeric: Tensor) -> Tensor:
        """`[sequences, numeric]` -> `[sequences, numeric * embedding]`."""
        low, high = self.edges[:, :-1], self.edges[:, 1:]
        width = (high - low).clamp_min(1e-6)  # repeated quantiles make empty bins
        encoded = ((numeric[..., None] - low) / width).clamp(0, 1)  # [sequences, numeric, bins]
        embedded = torch.einsum("snb,nbe->sne", encoded, self.weight) + self.bias  # [sequences, numeric, embedding]
        return embedded.relu().flatten(1)


class MeanEmbedding(nn.Embedding):
    """Several values a row: the mean of their embeddings, zeros when there are none."""

    def forward(self, values: Tensor) -> Tensor:
        """`[sequences, values]`, 0 where there is none -> `[sequences, embedding]`."""
        present = (values > 0).sum(1, keepdim=True).clamp_min(1)  # [sequences, 1]
        return super().forward(values).sum(1) / present


class TabularEncoder(nn.Module):
    """Columns -> one vector a sequence, `[sequences, out_features]`."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        self.out_features = config.hidden_size or config.numeric
        self.numeric = PiecewiseLinear(config) if config.bins else None
        self.categorical = nn.ModuleList(nn.Embedding(values, config.embedding_size) for values in config.categorical)
        self.multi = MeanEmbedding(config.multi, config.embedding_size, padding_idx=0) if config.multi else None
        embedded = len(config.categorical) + bool(config.multi) + (config.numeric if config.bins else 0)
        width = embedded * config.embedding_size + (0 if config.bins else config.numeric)
        self.mix = (
            nn.Sequential(
                nn.Linear(width, config.hidden_size),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.ReLU(),
                nn.Dropout(config.dropout),
            )
            if config.hidden_size
            else nn.Identity()
        )

    def forward(self, batch: TabularBatch) -> Tensor:
        """One row of columns a sequence -> `[sequences, out_features]`."""
        parts = [batch.numeric if self.numeric is None else self.numeric(batch.numeric)]
        parts += [embed(batch.categorical[:, column]) for column, embed in enumerate(self.categorical)]
        if self.multi is not None:
            parts.append(self.multi(batch.multi))
        mixed: Tensor = self.mix(torch.cat(parts, dim=1))
        return mixed
