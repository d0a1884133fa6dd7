"""The branch that reads columns beside the text.

Numbers come in raw, NaN where there is none, and are scaled here: what training learnt of them is part of the weights,
so that an engine takes what the table holds. A piecewise-linear encoding turns each into how far it lies through each
of its bins, bounded by quantiles of the training rows (Gorishniy et al. 2022, arXiv 2203.05556, section 3.2), so that a
small network can bend at thresholds as a decision tree does. Categorical columns are embedded, a multi-valued column is
the mean of its values' embeddings, and two hidden layers mix it all. With `hidden_size = 0` the scaled numbers
themselves join the text's vector: the study's model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bertforge.batch import TabularBatch
from bertforge.model.config import TabularConfig

# Narrowest bin, in standard deviations. Quantiles that coincide make a bin without width: a step, which begins this far
# above its edge, so that the values on the edge, often many, stay below it however an engine rounds them (by 1e-7).
NARROWEST = 1e-5


class ColumnScaler(nn.Module):
    """Raw numbers, NaN where missing -> (value - mean) / deviation, 0 where missing, and columns that say where."""

    mean: Tensor  # [numeric], of the logarithm where there is one
    std: Tensor  # [numeric]
    log: Tensor  # [numeric] bool
    indicators: Tensor  # [indicators] int64, numbers of columns

    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.numeric))
        self.register_buffer("std", torch.ones(config.numeric))
        # These stand in the configuration; as buffers they are on the model's device.
        log = torch.tensor([column in config.log for column in range(config.numeric)], dtype=torch.bool)
        self.register_buffer("log", log, persistent=False)
        indicators = torch.tensor(config.indicators, dtype=torch.int64)
        self.register_buffer("indicators", indicators, persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """`[sequences, numeric]` float32 -> `[sequences, numeric + indicators]`, in float32 under autocast too."""
        missing = raw.isnan()
        values = torch.where(self.log, raw.sign() * raw.abs().log1p(), raw)
        scaled = ((values - self.mean) / self.std).masked_fill(missing, 0)
        return torch.cat([scaled, missing[:, self.indicators].to(scaled.dtype)], dim=1)


class PiecewiseLinear(nn.Module):
    """Each value becomes `bins` numbers: 1 for a bin below it, 0 for one above, the fraction within its own."""

    edges: Tensor  # [inputs, bins + 1], ascending; set by training from quantiles

    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        edges = torch.linspace(-1, 1, config.bins + 1).repeat(config.numeric_inputs, 1)
        self.register_buffer("edges", edges)
        # One small linear layer per column: [inputs, bins, embedding].
        self.weight = nn.Parameter(torch.empty(config.numeric_inputs, config.bins, config.embedding_size))
        self.bias = nn.Parameter(torch.zeros(config.numeric_inputs, config.embedding_size))
        nn.init.uniform_(self.weight, -(config.bins**-0.5), config.bins**-0.5)

    def bins(self) -> tuple[Tensor, Tensor]:
        """Where each bin begins and how wide it is, `[inputs, bins]` both."""
        low, width = self.edges[:, :-1], self.edges.diff(dim=1)
        return torch.where(width < NARROWEST, low + NARROWEST, low), width.clamp_min(NARROWEST)

    def forward(self, scaled: Tensor) -> Tensor:
        """`[sequences, inputs]` -> `[sequences, inputs * embedding]`."""
        low, width = self.bins()
        encoded = ((scaled[..., None] - low) / width).clamp(0, 1)  # [sequences, inputs, bins]
        embedded = torch.einsum("snb,nbe->sne", encoded, self.weight) + self.bias  # [sequences, inputs, embedding]
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
        self.out_features = config.hidden_size or config.numeric_inputs
        self.scaler = ColumnScaler(config)
        self.numeric = PiecewiseLinear(config) if config.bins else None
        self.categorical = nn.ModuleList(nn.Embedding(values, config.embedding_size) for values in config.categorical)
        self.multi = MeanEmbedding(config.multi, config.embedding_size, padding_idx=0) if config.multi else None
        embedded = len(config.categorical) + bool(config.multi) + (config.numeric_inputs if config.bins else 0)
        width = embedded * config.embedding_size + (0 if config.bins else config.numeric_inputs)
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

    @torch.no_grad()
    def learn(self, mean: Sequence[float], std: Sequence[float], edges: Sequence[Sequence[float]]) -> None:
        """Takes over what the train rows taught of the numbers: `[numeric]` both, and `[inputs, bins + 1]`."""
        self.scaler.mean.copy_(torch.tensor(mean))
        self.scaler.std.copy_(torch.tensor(std))
        if self.numeric is not None:
            self.numeric.edges.copy_(torch.tensor(edges))

    def forward(self, batch: TabularBatch) -> Tensor:
        """One row of columns a sequence -> `[sequences, out_features]`."""
        scaled = self.scaler(batch.numeric)  # [sequences, inputs]
        parts = [scaled if self.numeric is None else self.numeric(scaled)]
        parts += [embed(batch.categorical[:, column]) for column, embed in enumerate(self.categorical)]
        if self.multi is not None:
            parts.append(self.multi(batch.multi))
        mixed: Tensor = self.mix(torch.cat(parts, dim=1))
        return mixed
