"""The forward pass of the GPU engine: seven operations a layer over packed tokens, and not one pass over memory beside.

A product leaves its plain result, without scale and bias; who reads it next applies both, for it reads every value
anyway: attention (where a bias of the keys changes nothing, and scales and biases of queries and values are one
multiply-add a row), and the LayerNorm that ends a residual branch. Who writes what a product reads writes it in the
product's own type, multiplied and rounded to 8 bits. GELU lives in the product before it.

The residual is bfloat16 throughout and stays in one place: a LayerNorm reads a row and writes it back.

The last layer is computed for first tokens alone, as everywhere in this package; its keys and values for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bertforge.kernels.attention import Bounds
from bertforge.native.weights import Layer, Linear, NativeWeights, Norm

POOLING = "tanh"
"""The pooler's activation."""


class Operations(Protocol):
    """What the pass is made of; each writes into the tensors given last."""

    def types(self, form: str) -> torch.dtype:
        """In which values are kept that a product of this form reads."""
        ...

    def embed(self, ids: Tensor, positions: Tensor, weights: NativeWeights, out: Written) -> None:
        """LayerNorm of the sum of a word's and a position's embedding."""
        ...

    def product(self, x: Tensor, linear: Linear, out: Tensor) -> None:
        """x weight', without scale and bias."""
        ...

    def activated(self, x: Tensor, linear: Linear, activation: str, after: Linear, out: Tensor) -> None:
        """GELU(x weight' * scale + bias), or another of `BertConfig.hidden_act`, as `after` reads it."""
        ...

    def attend(
        self, projections: tuple[Tensor, Tensor, Tensor], affine: Tensor, bounds: Bounds, after: Linear, out: Tensor
    ) -> None:
        """Attention of projections without scales and biases, as `after` reads it: see `attention_triton.infer`."""
        ...

    def residual_norm(self, x: Tensor, linear: Linear, residual: Tensor, norm: Norm, eps: float, out: Written) -> None:
        """LayerNorm(x * scale + bias + residual), `x` being the product of `linear`."""
        ...


@dataclass(frozen=True)
class Written:
    """Where a LayerNorm writes: the residual, and a copy in 8 bits where the next product reads that."""

    hidden: Tensor
    """[tokens, hidden]."""
    short: Tensor | None = None
    """[tokens, hidden], None where the next product reads `hidden`."""
    reader: Linear | None = None
    """The product that reads the copy."""

    @property
    def read(self) -> Tensor:
        """What the next product reads."""
        return self.hidden if self.short is None else self.short


class Room:
    """Memory that a pass writes to: made once for the largest pack, and shared by all passes, one after another.

    All bytes are 0 at first, so that what a pack does not fill is numbers.
    """

    def __init__(self, network: Network, tokens: int, sequences: int) -> None:
        config, size = network.weights.config, network.operations.types("bf16").itemsize  # no form takes more
        hidden, wide = config.hidden_size, config.intermediate_size
        bytes_ = {
            "hidden": (tokens + 1) * hidden,
            "short": (tokens + 1) * hidden,
            "first": sequences * hidden,
            "first_short": sequences * hidden,
            "products": tokens * 3 * hidden,  # of query, key and value, or of what ends a branch
            "attended": tokens * hidden,
            "activated": max(tokens * wide, sequences * hidden),  # and the last layer's queries
        }
        device = network.weights.words.device
        self._each = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        self._bytes = {name: torch.zeros(n * size, dtype=torch.uint8, device=device) for name, n in bytes_.items()}

    def each(self, sequences: int) -> Tensor:
        """`cu_seqlens` of one query a sequence."""
        return self._each[: sequences + 1]

    def __call__(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """The beginning of a part, as `[rows, width]`."""
        return self._bytes[name][: rows * width * dtype.itemsize].view(dtype).view(rows, width)


class Network:
    """The encoder and the pooler, and where no columns stand beside the text, the classifier."""

    def __init__(self, weights: NativeWeights, operations: Operations) -> None:
        self.weights, self.operations = weights, operations
        config = weights.config
        self.heads = (config.num_attention_heads, config.head_dim)
        self.wide = operations.types("bf16")
        """The type of the residual, and of products' results."""
        self._affine = [_affine(layer, *self.heads) for layer in weights.layers]

    def __call__(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, room: Room) -> Tensor:
        """Logits `[sequences, labels]` float32, or of a model that reads columns, pooled vectors `[sequences, hidden]`.

        `ids` and `positions` are `[tokens]` int32, `cu_seqlens` `[sequences + 1]` int32. Sequences may be empty, and
        tokens may follow the last one: their results mean nothing.
        """
        layers, bounds, tokens = self.weights.layers, Bounds(cu_seqlens, cu_seqlens), len(ids)
        written = self._written(room, "hidden", tokens, layers[0].qkv)
        self.operations.embed(ids, positions, self.weights, written)
        for number, layer in enumerate(layers[:-1]):
            qkv = room("products", tokens, 3 * layer.attended.bias.numel(), self.wide)
            self.operations.product(written.read, layer.qkv, qkv)
            query, key, value = qkv.view(tokens, 3, *self.heads).unbind(1)  # [tokens, heads, head_dim] each
            attended = self._attend(number, (query, key, value), bounds, room)
            written = self._feed_forward(layer, attended, written, "hidden", room, layers[number + 1].qkv)
        first = self._last(written, bounds, room)
        return self._head(first)

    def room(self, tokens: int, sequences: int) -> Room:
        """Memory for packs of so many tokens and sequences at most."""
        return Room(self, tokens, sequences)

    def _last(self, written: Written, bounds: Bounds, room: Room) -> Tensor:
        """The last layer for each sequence's first token, `[sequences, hidden]`."""
        layer, (tokens, hidden), starts = self.weights.layers[-1], written.hidden.shape, bounds.keys
        sequences = len(starts) - 1
        first = self._written(room, "first", sequences, layer.qkv)
        whole = self._written(room, "hidden", tokens + 1, layer.qkv)  # empty ones start one past the last token
        for every, some in ((whole.hidden, first.hidden), (whole.short, first.short)):
            if every is not None and some is not None:
                torch.index_select(every.view(torch.uint8), 0, starts[:-1], out=some.view(torch.uint8))
        query = room("activated", sequences, hidden, self.wide)  # nothing is activated yet
        self.operations.product(first.read, layer.qkv.rows(slice(0, hidden)), query)
        joined = room("products", tokens, 2 * hidden, self.wide)
        self.operations.product(written.read, layer.qkv.rows(slice(hidden, None)), joined)
        key, value = joined.view(tokens, 2, *self.heads).unbind(1)  # [tokens, heads, head_dim]
        projections = (query.view(-1, *self.heads), key, value)
        attended = self._attend(-1, projections, Bounds(room.each(sequences), starts), room)
        return self._feed_forward(layer, attended, first, "first", room, None).hidden

    def _attend(self, number: int, projections: tuple[Tensor, Tensor, Tensor], bounds: Bounds, room: Room) -> Tensor:
        """`[queries, hidden]` in the type that attention's output layer reads."""
        after = self.weights.layers[number].attended
        attended = room("attended", len(projections[0]), after.weight.shape[1], self.operations.types(after.form))
        out = attended.view(-1, *self.heads)
        self.operations.attend(projections, self._affine[number], bounds, after, out)
        return attended

    def _feed_forward(
        self, layer: Layer, attended: Tensor, before: Written, place: str, room: Room, after: Linear | None
    ) -> Written:
        """All that follows attention, as the product `after` reads it; in the memory of what was `before`."""
        (rows, hidden), config = before.hidden.shape, self.weights.config
        product = room("products", rows, hidden, self.wide)
        self.operations.product(attended, layer.attended, product)
        between = self._written(room, place, rows, layer.up)
        self.operations.residual_norm(
            product, layer.attended, before.hidden, layer.attention_norm, config.layer_norm_eps, between
        )
        form = self.operations.types(layer.down.form)
        activated = room("activated", rows, config.intermediate_size, form)
        self.operations.activated(between.read, layer.up, config.hidden_act, layer.down, activated)
        self.operations.product(activated, layer.down, product)
        written = self._written(room, place, rows, after)
        self.operations.residual_norm(product, layer.down, between.hidden, layer.norm, config.layer_norm_eps, written)
        return written

    def _written(self, room: Room, place: str, rows: int, reader: Linear | None) -> Written:
        """Where a LayerNorm writes what `reader` reads."""
        width = self.weights.config.hidden_size
        hidden = room(place, rows, width, self.wide)
        if reader is None or reader.multiplier is None:
            return Written(hidden)
        short = room("short" if place == "hidden" else "first_short", rows, width, self.operations.types(reader.form))
        return Written(hidden, short, reader)

    def _head(self, first: Tensor) -> Tensor:
        pooler, head = self.weights.pooler, self.weights.head
        pooled = torch.empty(first.shape, dtype=torch.float32, device=first.device)
        self.operations.activated(first, pooler, POOLING, pooler, pooled)
        if self.weights.config.tabular:
            return pooled
        return F.linear(pooled, head["classifier.weight"], head["classifier.bias"])


def _affine(layer: Layer, heads: int, dim: int) -> Tensor:
    """What `kernels.attention_triton.infer` takes, `[4, heads, head_dim]` float32."""
    one = torch.ones_like(layer.qkv.bias)
    query, key, value = (one if layer.qkv.scale is None else layer.qkv.scale).chunk(3)  # [hidden] each
    query_bias, _, value_bias = layer.qkv.bias.chunk(3)
    after = torch.ones_like(value) if layer.attended.multiplier is None else layer.attended.multiplier
    rows = (query * key, query_bias * key, value * after, value_bias * after)
    return torch.stack(rows).view(4, heads, dim)
