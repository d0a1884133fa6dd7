"""The columns' branch as nodes of a graph: what `model.tabular` computes, all in float32.

Inputs, of which a graph has those that its model reads: `numeric` `[batch, numeric]` float32, as the table has them,
NaN where missing; `categorical` `[batch, categorical]` and `multi` `[batch, values]` int64, names by their number.

The operators from a raw number to its place in a bin are chosen so that an engine leaves them as they are. OpenVINO
would fold (x - mean) / deviation into x * a + b, which cancels badly where the mean is large beside the deviation, and
nodes that it rewrites (divisions, Unsqueeze, Clip between products) lose the mark that keeps them in float32, see
`openvino_convert`. Hence sums before products, a Where or a Relu between them, and reciprocals.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from bertforge.export.graph import TYPES, Graph
from bertforge.model.config import TabularConfig
from bertforge.model.tabular import ColumnScaler, MeanEmbedding, PiecewiseLinear, TabularEncoder


def add_columns(graph: Graph, encoder: TabularEncoder, config: TabularConfig) -> str:
    """Declares the inputs and adds the nodes; returns the name of the branch's vector, `[batch, out_features]`."""
    graph.scope = "columns/"
    parts = []
    if config.numeric:
        raw = graph.input("numeric", np.float32, ("batch", config.numeric))
        scaled = _scaled(graph, encoder.scaler, raw)  # [batch, inputs]
        parts.append(scaled if encoder.numeric is None else _piecewise(graph, encoder.numeric, scaled))
    if config.categorical:
        numbers = graph.input("categorical", np.int64, ("batch", len(config.categorical)))
        for column, embedding in enumerate(encoder.categorical):
            assert isinstance(embedding, nn.Embedding)
            table = graph.constant(f"tabular.categorical.{column}", _array(embedding.weight))
            number = graph.add("Gather", numbers, graph.constant(f"column_{column}", np.array(column)), axis=1)
            parts.append(graph.add("Gather", table, number))  # [batch, embedding]
    if encoder.multi is not None:
        parts.append(_mean(graph, encoder.multi, graph.input("multi", np.int64, ("batch", "values"))))
    value = graph.add("Concat", *parts, axis=1)
    for place, layer in enumerate(encoder.mix.children()):
        if isinstance(layer, nn.Linear):
            value = graph.dense(value, f"tabular.mix.{place}", _array(layer.weight), _array(layer.bias))
        elif isinstance(layer, nn.ReLU):
            value = graph.add("Relu", value)
    return value


def _scaled(graph: Graph, scaler: ColumnScaler, raw: str) -> str:
    """`[batch, numeric]` -> `[batch, numeric + indicators]`."""
    missing = graph.add("IsNaN", raw)
    values = raw
    if scaler.log.any():
        tail = graph.add("Log", graph.add("Add", graph.add("Abs", raw), graph.constant("one", _number(1))))
        logs = graph.add("Mul", graph.add("Sign", raw), tail)
        values = graph.add("Where", graph.constant("tabular.log", scaler.log.cpu().numpy()), logs, raw)
    centred = graph.add("Add", values, graph.constant("tabular.minus_mean", -_array(scaler.mean)))
    filled = graph.add("Where", missing, graph.constant("zero", _number(0)), centred)
    scaled = graph.add("Mul", filled, graph.constant("tabular.per_std", 1 / _array(scaler.std)))
    if not len(scaler.indicators):
        return scaled
    flags = graph.cast(missing, TYPES["fp32"])
    flags = graph.add("Gather", flags, graph.ints(*scaler.indicators.tolist()), axis=1)
    return graph.add("Concat", scaled, flags, axis=1)


def _piecewise(graph: Graph, encoder: PiecewiseLinear, scaled: str) -> str:
    """`[batch, inputs]` -> `[batch, inputs * embedding]`, one product a column."""
    low, width = (_array(bound)[:, None] for bound in encoder.bins())  # [inputs, 1, bins]
    value = graph.add(
        "Reshape", graph.add("Transpose", scaled, perm=(1, 0)), graph.ints(0, -1, 1)
    )  # [inputs, batch, 1]
    above = graph.add("Relu", graph.add("Add", value, graph.constant("tabular.minus_low", -low)))
    within = graph.add("Min", above, graph.constant("tabular.width", width))  # [inputs, batch, bins]
    value = graph.add("Mul", within, graph.constant("tabular.per_width", 1 / width))
    value = graph.add("MatMul", value, graph.constant("tabular.numeric.weight", _array(encoder.weight)))
    value = graph.add("Add", value, graph.constant("tabular.numeric.bias", _array(encoder.bias)[:, None]))
    value = graph.add("Transpose", graph.add("Relu", value), perm=(1, 0, 2))  # [batch, inputs, embedding]
    return graph.add("Reshape", value, graph.ints(0, encoder.bias.numel()))


def _mean(graph: Graph, embedding: MeanEmbedding, values: str) -> str:
    """`[batch, values]` -> `[batch, embedding]`; the row of number 0 is zeros."""
    table = graph.constant("tabular.multi", _array(embedding.weight))
    total = graph.add("ReduceSum", graph.add("Gather", table, values), graph.ints(1), keepdims=0)
    given = graph.cast(graph.add("Greater", values, graph.constant("none", np.array(0))), TYPES["fp32"])
    count = graph.add("ReduceSum", given, graph.ints(1), keepdims=1)  # [batch, 1]
    return graph.add("Div", total, graph.add("Max", count, graph.constant("one", _number(1))))


def _number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _array(tensor: Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().float().cpu().numpy()
    return values
