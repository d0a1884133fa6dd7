"""A BERT classifier as an ONNX graph over padded batches.

Inputs: `input_ids` and `attention_mask`, `[batch, seq]`, both axes dynamic; where the model reads columns, one more for
each kind that it reads, see `columns.encoder`. Output: `logits` `[batch, labels]` float32.

Types are in the graph: matrix products in `precision`; LayerNorm, softmax, the head and the columns in float32, which
float16 would overflow or blur (Kim et al. 2021, "I-BERT", keeps the same ones apart). The mask is a finite constant:
minus infinity becomes NaN in a row that is all padding.

Q/DQ: with `scales`, each quantized product reads its activation through QuantizeLinear and DequantizeLinear with one
scale a tensor, and its weight, stored in 8 bits, through DequantizeLinear with one scale an output channel. Engines
fuse these pairs into 8-bit products.

`fused` is for ONNX Runtime on CUDA: attention is its operator MultiHeadAttention, which does not write the scores out
where the length is a multiple of 8, and LayerNorm takes and gives `precision`, so that the residual's sum joins it.
So in float16, in that graph alone, LayerNorm is not in float32 and softmax is inside the operator; the largest logit
difference from float32 was 0.0014 (BERT-base with random weights, H100, 2026-11-23).

The last layer computes what the head reads and no more: its queries, output projection and feed-forward run on the
first token alone. The logits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from torch import nn

from bertforge.artifact import write_atomic
from bertforge.errors import ArtifactError, UsageError
from bertforge.export.graph import TYPES, Graph
from bertforge.model.attention import BertAttention
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.encoder import BertLayer
from bertforge.scales import Scales

MASKED = -10_000.0  # added to the scores of padding: exp of it is 0 in every type used here
_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


_STORED: dict[str, Any] = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


def export_onnx(
    model: BertForSequenceClassification,
    path: Path,
    *,
    precision: str = "fp32",
    ids: str = "int64",
    scales: Scales | None = None,
    fused: bool = False,
) -> Path:
    """Writes `model`, plain and in evaluation mode, to `path`.

    `precision` is the type of unquantized products, fp32, fp16 or bf16; `ids` the type of `input_ids` and
    `attention_mask`; `fused` writes operators that ONNX Runtime alone knows. Raises UsageError for other values and
    ArtifactError for a model with adapters.
    """
    if precision not in TYPES or ids not in ("int64", "int32"):
        raise UsageError(f"precision {precision!r} or ids {ids!r} is unknown: fp32, fp16 or bf16; int64 or int32")
    if any(name.endswith("lora_A") for name, _ in model.named_modules()):
        raise ArtifactError("the model still has LoRA adapters; merge them first: bertforge merge RUN --out DIR")
    exporter = _Exporter(model, TYPES[precision], scales, fused)
    graph = exporter.build(np.dtype(ids))
    return write_atomic(path, graph.SerializeToString())


class _Exporter:
    """Walks the model's modules and adds their nodes; every method takes and returns names of values."""

    def __init__(
        self, model: BertForSequenceClassification, dtype: np.dtype[Any], scales: Scales | None, fused: bool
    ) -> None:
        self.model, self.config = model, model.config
        self.dtype, self.scales, self.fused = dtype, scales, fused
        self.graph = Graph()
        self.names = {module: name for name, module in model.named_modules()}
        self.made: dict[tuple[Any, ...], str] = {}

    def build(self, ids: np.dtype[Any]) -> Any:
        graph, config = self.graph, self.config
        input_ids = graph.input("input_ids", ids, ("batch", "seq"))
        mask = graph.input("attention_mask", ids, ("batch", "seq"))
        hidden = self.embeddings(input_ids)
        bias = self.mask_bias(mask)
        last = config.num_hidden_layers - 1
        for index, layer in enumerate(self.model.bert.encoder.layer):
            assert isinstance(layer, BertLayer)
            graph.scope = f"layer{index}/"
            hidden = self.layer(layer, hidden, bias, first_only=index == last)
        columns = None
        if self.model.tabular is not None:
            graph.scope = "columns/"
            columns = self.model.tabular.onnx(graph)  # [batch, columns]
        graph.scope = "head/"
        first = graph.cast(graph.add("Squeeze", hidden, graph.ints(1)), TYPES["fp32"])  # [batch, hidden]
        pooled = graph.add("Tanh", self.dense(self.model.bert.pooler.dense, first))
        features = pooled if columns is None else graph.add("Concat", pooled, columns, axis=1)
        logits = self.dense(self.model.classifier, features)  # [batch, labels]
        return graph.finish(
            logits,
            "logits",
            ("batch", len(config.labels)),
            {"precision": str(self.dtype), "labels": "\n".join(config.labels)},
        )

    def embeddings(self, input_ids: str) -> str:
        """`[batch, seq]` -> `[batch, seq, hidden]`."""
        graph, table = self.graph, self.model.bert.embeddings
        graph.scope = "embeddings/"
        words = graph.constant("word_embeddings", _array(table.word_embeddings.weight).astype(self.dtype))
        places = _array(table.position_embeddings.weight) + _array(table.token_type_embeddings.weight)[0]
        length = graph.add("Shape", input_ids, start=1, end=2)  # [1]
        positions = graph.add(
            "Slice",
            graph.constant("position_embeddings", places),
            graph.ints(0),
            length,
            graph.ints(0),
        )  # [seq, hidden]
        word = graph.cast(graph.add("Gather", words, input_ids), TYPES["fp32"])  # [batch, seq, hidden]
        return self.layer_norm(table.LayerNorm, graph.add("Add", word, positions), cast=False)

    def mask_bias(self, mask: str) -> str:
        """`[batch, seq]` -> `[batch, 1, 1, seq]` float32: 0 where a token is real, MASKED elsewhere."""
        graph = self.graph
        graph.scope = "mask/"
        padding = graph.add("Equal", mask, graph.constant("no", np.zeros((), self._ids(mask))))
        masked = graph.constant("masked", np.array(MASKED, np.float32))
        kept = graph.constant("kept", np.array(0, np.float32))
        bias = graph.add("Where", padding, masked, kept)
        return graph.add("Unsqueeze", bias, graph.ints(1, 2))

    def fused_attention(self, attention: BertAttention, hidden: str, asking: str, bias: str) -> str:
        """As `attention`; `bias` is written out for every query, once for all layers."""
        graph, of = self.graph, attention.self
        query, key, value = self.linear(of.query, asking), self.linear(of.key, hidden), self.linear(of.value, hidden)
        bias = self.as_products(bias)
        if asking == hidden:  # the first token alone needs one row, which is there
            bias = self.once(("for every query", bias), lambda: self.for_every_query(bias, hidden))
        heads = self.config.num_attention_heads
        inputs = (query, key, value, "", "", bias)
        return graph.add("MultiHeadAttention", *inputs, domain="com.microsoft", num_heads=heads)

    def for_every_query(self, bias: str, hidden: str) -> str:
        """`[batch, 1, 1, seq]` -> `[batch, 1, seq, seq]`."""
        graph = self.graph
        one = graph.ints(1)
        shape = graph.add("Concat", one, one, graph.add("Shape", hidden, start=1, end=2), one, axis=0)  # 1, 1, seq, 1
        return graph.add("Expand", bias, shape)

    def as_products(self, value: str) -> str:
        """`value` in the products' type."""
        if self.dtype == TYPES["fp32"]:
            return value
        return self.once(("cast", value), lambda: self.graph.cast(value, self.dtype))

    def layer(self, layer: BertLayer, hidden: str, bias: str, *, first_only: bool) -> str:
        """`[batch, seq, hidden]` -> the same, or `[batch, 1, hidden]`."""
        graph = self.graph
        residual = hidden
        if first_only:
            residual = graph.add("Slice", hidden, graph.ints(0), graph.ints(1), graph.ints(1))  # [batch, 1, hidden]
        attended = self.attention(layer.attention, hidden, residual, bias)
        output = layer.attention.output
        attended = self.residual(output.LayerNorm, self.linear(output.dense, attended), residual)
        wide = self.activation(self.linear(layer.intermediate.dense, attended))
        return self.residual(layer.output.LayerNorm, self.linear(layer.output.dense, wide), attended)

    def attention(self, attention: BertAttention, hidden: str, asking: str, bias: str) -> str:
        """Keys and values of `hidden` `[batch, seq, hidden]`, queries of `asking` `[batch, queries, hidden]`."""
        if self.fused:
            return self.fused_attention(attention, hidden, asking, bias)
        graph, of = self.graph, attention.self
        point = self.names[of]
        scale = graph.constant(f"scale_{self.dtype}", np.asarray(self.config.head_dim**-0.5, self.dtype))
        # [batch, heads, queries, head_dim], [batch, heads, head_dim, seq], [batch, heads, seq, head_dim]
        query = graph.add("Mul", self.heads(self.linear(of.query, asking), (0, 2, 1, 3)), scale)
        key = self.heads(self.linear(of.key, hidden), (0, 2, 3, 1))
        value = self.heads(self.linear(of.value, hidden), (0, 2, 1, 3))
        query, key = self.quantized(query, f"{point}.query_out"), self.quantized(key, f"{point}.key_out")
        scores = graph.cast(graph.add("MatMul", query, key), TYPES["fp32"])  # [batch, heads, queries, seq]
        shares = graph.cast(graph.add("Softmax", graph.add("Add", scores, bias), axis=-1), self.dtype)
        shares, value = self.quantized(shares, f"{point}.shares"), self.quantized(value, f"{point}.value_out")
        mixed = graph.add("Transpose", graph.add("MatMul", shares, value), perm=(0, 2, 1, 3))
        return graph.add("Reshape", mixed, graph.ints(0, 0, -1))  # [batch, queries, hidden]

    def heads(self, value: str, order: tuple[int, ...]) -> str:
        """`[batch, seq, hidden]` -> `[batch, seq, heads, head_dim]`, then `order`."""
        split = self.graph.add("Reshape", value, self.graph.ints(0, 0, self.config.num_attention_heads, -1))
        return self.graph.add("Transpose", split, perm=order)

    def residual(self, norm: nn.LayerNorm, value: str, residual: str) -> str:
        return self.layer_norm(norm, self.graph.add("Add", value, residual))

    def layer_norm(self, norm: nn.LayerNorm, value: str, *, cast: bool = True) -> str:
        """In float32, whatever comes in; `self.dtype` comes out."""
        graph, name = self.graph, self.names[norm]
        if self.fused:
            value = value if cast else self.as_products(value)
            weight, shift = (
                graph.constant(f"{name}.{kind}", _array(getattr(norm, kind)).astype(self.dtype))
                for kind in ("weight", "bias")
            )
            return graph.add("LayerNormalization", value, weight, shift, epsilon=float(norm.eps))
        normed = graph.add(
            "LayerNormalization",
            graph.cast(value, TYPES["fp32"]) if cast and self.dtype != TYPES["fp32"] else value,
            graph.constant(f"{name}.weight", _array(norm.weight)),
            graph.constant(f"{name}.bias", _array(norm.bias)),
            epsilon=float(norm.eps),
        )
        return graph.cast(normed, self.dtype) if self.dtype != TYPES["fp32"] else normed

    def activation(self, value: str) -> str:
        if self.config.hidden_act == "relu":
            return self.graph.add("Relu", value)
        return self.graph.add("Gelu", value, approximate=_ACTIVATIONS[self.config.hidden_act])

    def linear(self, linear: nn.Linear, value: str) -> str:
        """`[..., in]` -> `[..., out]` in `self.dtype`, quantized where the scales say so."""
        graph, name = self.graph, self.names[linear]
        bias = graph.constant(f"{name}.bias", _array(linear.bias).astype(self.dtype))
        weight = _array(linear.weight)  # [out, in]
        if self.scales and name in self.scales.activations:
            value, weight_name = self.quantized_linear(name, value, weight, self.scales)
        else:
            weight_name = graph.constant(f"{name}.weight", weight.T.astype(self.dtype))
        return graph.add("Add", graph.add("MatMul", value, weight_name), bias)

    def quantized_linear(self, name: str, value: str, weight: np.ndarray, scales: Scales) -> tuple[str, str]:
        """The activation behind its Q/DQ pair, and the weight `[in, out]` behind its DequantizeLinear."""
        graph = self.graph
        if (smooth := scales.smooth.get(name)) is not None:
            value = self.once(("smooth", value, smooth.tobytes()), lambda: self.smoothed(value, name, smooth))
            weight = weight / smooth
        value = self.quantized(value, name)
        amax = scales.weights.get(name, np.abs(weight).max(axis=1))  # [out]
        scale = self.scale_of(amax / scales.largest)
        stored = np.clip(weight / scale[:, None].astype(np.float32), -scales.largest, scales.largest)
        if scales.format == "int8":
            stored = np.rint(stored)
        stored_name = graph.constant(f"{name}.weight_{scales.format}", stored.T.astype(_STORED[scales.format]))
        scale_name = graph.constant(f"{name}.weight_scale", scale)
        return value, graph.add("DequantizeLinear", stored_name, scale_name, self.zero(scales, len(scale)), axis=1)

    def quantized(self, value: str, point: str) -> str:
        """`value` through QuantizeLinear and DequantizeLinear, if calibration has a scale for `point`.

        Layers that read one value with one scale share the pair.
        """
        scales = self.scales
        if scales is None or point not in scales.activations:
            return value
        amax = scales.activations[point]
        return self.once(("pair", value, amax), lambda: self.pair(value, point, amax / scales.largest, scales))

    def pair(self, value: str, point: str, size: float, scales: Scales) -> str:
        graph, zero = self.graph, self.zero(scales)
        scale = graph.constant(f"{point}.scale", self.scale_of(np.asarray(size)))
        return graph.add("DequantizeLinear", graph.add("QuantizeLinear", value, scale, zero), scale, zero)

    def scale_of(self, size: np.ndarray) -> np.ndarray:
        """`size` in the products' type, never 0: a channel that is always 0 has no range."""
        limits: Any = ml_dtypes.finfo  # untyped
        sizes: np.ndarray = np.maximum(size, float(limits(self.dtype).tiny))
        return sizes.astype(self.dtype)

    def smoothed(self, value: str, name: str, factor: np.ndarray) -> str:
        return self.graph.add("Mul", value, self.graph.constant(f"{name}.smooth", factor.astype(self.dtype)))

    def once(self, key: tuple[Any, ...], make: Callable[[], str]) -> str:
        """What `make` adds, made the first time `key` is asked for."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def zero(self, scales: Scales, channels: int = 0) -> str:
        """Symmetric: the zero point is 0; its type tells the format."""
        shape = (channels,) if channels else ()
        return self.graph.constant(f"zero_{scales.format}_{channels}", np.zeros(shape, _STORED[scales.format]))

    def dense(self, linear: nn.Linear, value: str) -> str:
        """The head's layers stay in float32."""
        return self.graph.dense(value, self.names[linear], _array(linear.weight), _array(linear.bias))

    def _ids(self, name: str) -> Any:
        from onnx import helper

        found = next(value for value in self.graph.inputs if value.name == name)
        return helper.tensor_dtype_to_np_dtype(found.type.tensor_type.elem_type)


def _array(parameter: Any) -> np.ndarray:
    value: np.ndarray = parameter.detach().float().cpu().numpy()
    return value
