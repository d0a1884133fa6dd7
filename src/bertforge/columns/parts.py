"""The modules of the kinds that come along, and the same as nodes of a graph.

They are apart from the kinds so that whoever only encodes columns, as a server's front does, need not import torch.

In a graph, the operators from a raw number to its place in a bin are chosen so that an engine leaves them as they are.
OpenVINO would fold (x - mean) / deviation into x * a + b, which cancels badly where the mean is large beside the
deviation, and nodes that it rewrites (divisions, Unsqueeze, Clip between products) lose the mark that keeps them in
float32, see `export.openvino_convert`. Hence sums before products, a Where or a Relu between them, and reciprocals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from bertforge.columns.kind import Nodes

if TYPE_CHECKING:
    from bertforge.columns.numeric import NumericShape

# Narrowest bin, in standard deviations. Quantiles that coincide make a bin without width: a step, which begins this far
# above its edge, so that the values on the edge, often many, stay below it however an engine rounds them (by 1e-7).
NARROWEST = 1e-5


class Part(nn.Module):
    """A module of a kind, and the same as nodes of a graph."""

    out_features: int
    """Width of the result."""

    def forward(self, value: Tensor) -> Tensor:
        """-> `[sequences, out_features]`."""
        raise NotImplementedError

    def onnx(self, graph: Nodes, value: str) -> str:
        """The nodes that compute `forward` of `value` `[batch, ...]`, in float32; returns the result's name."""
        raise NotImplementedError


class ColumnScaler(Part):
    """Raw numbers, NaN where missing -> (value - mean) / deviation, 0 where missing, and columns that say where."""

    mean: Tensor  # [numeric], of the logarithm where there is one
    std: Tensor  # [numeric]
    log: Tensor  # [numeric] bool
    indicators: Tensor  # [indicators] int64, numbers of columns

    def __init__(self, shape: NumericShape) -> None:
        super().__init__()
        self.out_features = shape.inputs
        self.register_buffer("mean", torch.zeros(shape.numeric))
        self.register_buffer("std", torch.ones(shape.numeric))
        # These stand in the configuration; as buffers they are on the model's device.
        log = torch.tensor([column in shape.log for column in range(shape.numeric)], dtype=torch.bool)
        self.register_buffer("log", log, persistent=False)
        indicators = torch.tensor(shape.indicators, dtype=torch.int64)
        self.register_buffer("indicators", indicators, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """`[sequences, numeric]` float32 -> `[sequences, numeric + indicators]`, in float32 under autocast too."""
        missing = value.isnan()
        values = torch.where(self.log, value.sign() * value.abs().log1p(), value)
        scaled = ((values - self.mean) / self.std).masked_fill(missing, 0)
        return torch.cat([scaled, missing[:, self.indicators].to(scaled.dtype)], dim=1)

    def onnx(self, graph: Nodes, value: str) -> str:
        missing = graph.add("IsNaN", value)
        values = value
        if self.log.any():
            tail = graph.add("Log", graph.add("Add", graph.add("Abs", value), graph.constant("one", _number(1))))
            logs = graph.add("Mul", graph.add("Sign", value), tail)
            values = graph.add("Where", graph.constant("tabular.log", self.log.cpu().numpy()), logs, value)
        centred = graph.add("Add", values, graph.constant("tabular.minus_mean", -as_array(self.mean)))
        filled = graph.add("Where", missing, graph.constant("zero", _number(0)), centred)
        scaled = graph.add("Mul", filled, graph.constant("tabular.per_std", 1 / as_array(self.std)))
        if not len(self.indicators):
            return scaled
        flags = graph.cast(missing, np.dtype(np.float32))
        flags = graph.add("Gather", flags, graph.ints(*self.indicators.tolist()), axis=1)
        return graph.add("Concat", scaled, flags, axis=1)  # [batch, numeric + indicators]


class PiecewiseLinear(Part):
    """Each value becomes `bins` numbers: 1 for a bin below it, 0 for one above, the fraction within its own."""

    edges: Tensor  # [inputs, bins + 1], ascending; set by training from quantiles

    def __init__(self, shape: NumericShape, embedding_size: int) -> None:
        super().__init__()
        self.out_features = shape.inputs * embedding_size
        edges = torch.linspace(-1, 1, shape.bins + 1).repeat(shape.inputs, 1)
        self.register_buffer("edges", edges)
        # One small linear layer per column: [inputs, bins, embedding].
        self.weight = nn.Parameter(torch.empty(shape.inputs, shape.bins, embedding_size))
        self.bias = nn.Parameter(torch.zeros(shape.inputs, embedding_size))
        nn.init.uniform_(self.weight, -(shape.bins**-0.5), shape.bins**-0.5)

    def bins(self) -> tuple[Tensor, Tensor]:
        """Where each bin begins and how wide it is, `[inputs, bins]` both."""
        low, width = self.edges[:, :-1], self.edges.diff(dim=1)
        return torch.where(width < NARROWEST, low + NARROWEST, low), width.clamp_min(NARROWEST)

    def forward(self, value: Tensor) -> Tensor:
        """`[sequences, inputs]`, scaled -> `[sequences, inputs * embedding]`."""
        low, width = self.bins()
        encoded = ((value[..., None] - low) / width).clamp(0, 1)  # [sequences, inputs, bins]
        embedded = torch.einsum("snb,nbe->sne", encoded, self.weight) + self.bias  # [sequences, inputs, embedding]
        return embedded.relu().flatten(1)

    def onnx(self, graph: Nodes, value: str) -> str:
        """One product a column."""
        low, width = (as_array(bound)[:, None] for bound in self.bins())  # [inputs, 1, bins]
        value = graph.add(
            "Reshape", graph.add("Transpose", value, perm=(1, 0)), graph.ints(0, -1, 1)
        )  # [inputs, batch, 1]
        above = graph.add("Relu", graph.add("Add", value, graph.constant("tabular.minus_low", -low)))
        within = graph.add("Min", above, graph.constant("tabular.width", width))  # [inputs, batch, bins]
        value = graph.add("Mul", within, graph.constant("tabular.per_width", 1 / width))
        value = graph.add("MatMul", value, graph.constant("tabular.numeric.weight", as_array(self.weight)))
        value = graph.add("Add", value, graph.constant("tabular.numeric.bias", as_array(self.bias)[:, None]))
        value = graph.add("Transpose", graph.add("Relu", value), perm=(1, 0, 2))  # [batch, inputs, embedding]
        return graph.add("Reshape", value, graph.ints(0, self.bias.numel()))


class Embeddings(Part):
    """A table of embeddings for each column, side by side in the result."""

    def __init__(self, sizes: tuple[int, ...], embedding_size: int) -> None:
        super().__init__()
        self.out_features = len(sizes) * embedding_size
        for column, values in enumerate(sizes):
            self.add_module(str(column), nn.Embedding(values, embedding_size))

    def forward(self, value: Tensor) -> Tensor:
        """`[sequences, columns]` -> `[sequences, columns * embedding]`."""
        return torch.cat([embed(value[:, column]) for column, embed in enumerate(self.children())], dim=1)

    def onnx(self, graph: Nodes, value: str) -> str:
        embedded = []
        for column, embedding in enumerate(self.children()):
            assert isinstance(embedding, nn.Embedding)
            table = graph.constant(f"tabular.categorical.{column}", as_array(embedding.weight))
            number = graph.add("Gather", value, graph.constant(f"column_{column}", np.array(column)), axis=1)
            embedded.append(graph.add("Gather", table, number))  # [batch, embedding]
        return embedded[0] if len(embedded) == 1 else graph.add("Concat", *embedded, axis=1)


class MeanEmbedding(Part):
    """The mean of the embeddings of a row's values, zeros when there are none. The row of number 0 stays zeros."""

    def __init__(self, values: int, embedding_size: int) -> None:
        super().__init__()
        self.out_features = embedding_size
        self.weight = nn.Parameter(torch.empty(values, embedding_size))
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight[0] = 0

    def forward(self, value: Tensor) -> Tensor:
        """`[sequences, values]`, 0 where there is none -> `[sequences, embedding]`."""
        present = (value > 0).sum(1, keepdim=True).clamp_min(1)  # [sequences, 1]
        total: Tensor = nn.functional.embedding(value, self.weight, padding_idx=0).sum(1)
        return total / present

    def onnx(self, graph: Nodes, value: str) -> str:
        table = graph.constant("tabular.multi", as_array(self.weight))
        total = graph.add("ReduceSum", graph.add("Gather", table, value), graph.ints(1), keepdims=0)
        given = graph.cast(graph.add("Greater", value, graph.constant("none", np.array(0))), np.dtype(np.float32))
        count = graph.add("ReduceSum", given, graph.ints(1), keepdims=1)  # [batch, 1]
        return graph.add("Div", total, graph.add("Max", count, graph.constant("one", np.array(1, np.float32))))


def as_array(tensor: Tensor) -> np.ndarray:
    """A weight as the float32 constant of a graph."""
    values: np.ndarray = tensor.detach().float().cpu().numpy()
    return values


def _number(value: float) -> np.ndarray:
    return np.array(value, np.float32)
