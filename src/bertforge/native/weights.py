"""The weights of a trained classifier as the GPU engine multiplies with them, and the file that holds them.

It is a copy for speed, and there is no way back from it:

- query, key and value are one matrix, for they read the same hidden states;
- a product in 8 bits has its weight in 8 bits, one scale for each output channel, as the Q/DQ graphs of
  `export.bert_onnx` have it; all others have theirs in bfloat16, LayerNorms and biases in float32;
- the embedding of token type 0, the only one, is added to the positions';
- what a product reads in 8 bits is multiplied by `multiplier` where it is written: SmoothQuant's factor over the step
  of the activation. What comes out is multiplied by `scale`, the steps of activation and weight, where it is read.

The classifier and the columns' branch stay as they are, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from bertforge.artifact import write_atomic
from bertforge.errors import ArtifactError
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from bertforge.model.encoder import BertLayer
from bertforge.scales import Scales

WEIGHTS = "native.safetensors"
TYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LEAST = 1e-30  # of a range: a channel that is always 0 has none


@dataclass(frozen=True)
class Linear:
    """One product of the encoder: y = (x * multiplier) weight' * scale + bias."""

    weight: Tensor
    """[out, in], of one of TYPES."""
    bias: Tensor
    """[out] float32."""
    scale: Tensor | None = None
    """[out] float32; None for 1."""
    multiplier: Tensor | None = None
    """[in] float32, before x is rounded to the type of `weight`; None for 1."""

    @property
    def form(self) -> str:
        """bf16, int8 or fp8."""
        return next(name for name, dtype in TYPES.items() if dtype == self.weight.dtype)

    def rows(self, part: slice) -> Linear:
        """Some of its outputs."""
        scale = None if self.scale is None else self.scale[part]
        return replace(self, weight=self.weight[part], bias=self.bias[part], scale=scale)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm."""

    weight: Tensor
    """[hidden] float32."""
    bias: Tensor
    """[hidden] float32."""


@dataclass(frozen=True)
class Layer:
    """One layer of the encoder."""

    qkv: Linear
    """[3 * hidden, hidden]: queries, keys, values."""
    attended: Linear
    """[hidden, hidden], attention's output."""
    attention_norm: Norm
    up: Linear
    """[intermediate, hidden]."""
    down: Linear
    """[hidden, intermediate]."""
    norm: Norm


@dataclass(frozen=True)
class NativeWeights:
    """All of a classifier's, on one device."""

    config: BertConfig
    words: Tensor
    """[vocabulary, hidden] bfloat16."""
    places: Tensor
    """[positions, hidden] float32, with the token type's embedding: few enough to stay in the cache."""
    embedding_norm: Norm
    layers: tuple[Layer, ...]
    pooler: Linear
    """[hidden, hidden]."""
    head: dict[str, Tensor]
    """The classifier's and those of the columns' branch, under the model's own names, in float32."""

    @classmethod
    def of(cls, model: BertForSequenceClassification, scales: Scales | None) -> Self:
        """The copy of a plain model; where `scales` has a range for a linear layer, it is in 8 bits."""
        table, joined = model.bert.embeddings, [_layer(layer, number, scales) for number, layer in _layers(model)]
        head = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("bert.")}
        return cls(
            model.config,
            table.word_embeddings.weight.detach().to(torch.bfloat16),
            (table.position_embeddings.weight + table.token_type_embeddings.weight[0]).detach().float(),
            _norm(table.LayerNorm),
            tuple(joined),
            _linear([model.bert.pooler.dense], ["bert.pooler.dense"], None),
            {name: tensor.detach().clone() for name, tensor in head.items()},
        )

    def save(self, folder: Path) -> None:
        """Writes `native.safetensors` and `config.json`."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in flat("", self)}
        write_atomic(folder / WEIGHTS, to_bytes(tensors))
        self.config.save(folder)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """Reads what `save` wrote; raises ArtifactError when it is missing, damaged or not whole."""
        config, path = BertConfig.load(folder), folder / WEIGHTS
        try:
            found = load_file(path, device=str(device))
            part = _Part(found)
            layers = tuple(_read_layer(part.of(f"layers.{i}")) for i in range(config.num_hidden_layers))
            head = {name.removeprefix("head."): found[name] for name in found if name.startswith("head.")}
            norm, pooler = part.norm("embedding_norm"), part.linear("pooler")
            return cls(config, part["words"], part["places"], norm, layers, pooler, head)
        except (SafetensorError, OSError, KeyError) as error:
            raise ArtifactError(
                f"{path} is missing, damaged or not whole ({str(error)[:120]}); compile it again: bertforge compile"
            ) from error


@dataclass(frozen=True)
class _Part:
    """The tensors of a file whose names begin alike."""

    found: Mapping[str, Tensor]
    prefix: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.found[self.prefix + name]

    def of(self, name: str) -> _Part:
        return _Part(self.found, f"{self.prefix}{name}.")

    def norm(self, name: str) -> Norm:
        inner = self.of(name)
        return Norm(inner["weight"], inner["bias"])

    def linear(self, name: str) -> Linear:
        inner = self.of(name)
        rest = (self.found.get(inner.prefix + each) for each in ("scale", "multiplier"))
        return Linear(inner["weight"], inner["bias"], *rest)


def _read_layer(part: _Part) -> Layer:
    return Layer(
        part.linear("qkv"), part.linear("attended"), part.norm("attention_norm"),
        part.linear("up"), part.linear("down"), part.norm("norm"),
    )  # fmt: skip


def flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under `value`, by the path of its fields."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    if isinstance(value, NativeWeights | Layer | Linear | Norm):
        items = vars(value).items()
    for part, inner in items:
        yield from flat(f"{name}.{part}" if name else str(part), inner)


def _layers(model: BertForSequenceClassification) -> Iterator[tuple[str, BertLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, BertLayer):
            yield name, module


def _layer(layer: BertLayer, name: str, scales: Scales | None) -> Layer:
    own = layer.attention.self
    names = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
    return Layer(
        qkv=_linear([own.query, own.key, own.value], names, scales),
        attended=_linear([layer.attention.output.dense], [f"{name}.attention.output.dense"], scales),
        attention_norm=_norm(layer.attention.output.LayerNorm),
        up=_linear([layer.intermediate.dense], [f"{name}.intermediate.dense"], scales),
        down=_linear([layer.output.dense], [f"{name}.output.dense"], scales),
        norm=_norm(layer.output.LayerNorm),
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach().float(), norm.bias.detach().float())


def _linear(linears: list[nn.Linear], names: list[str], scales: Scales | None) -> Linear:
    """Layers that read the same values, joined; in 8 bits where `scales` has their ranges, those `names`."""
    bias = torch.cat([linear.bias.detach().float() for linear in linears])
    weights = [linear.weight.detach().float() for linear in linears]
    if scales is None or not scales.activations.keys() & set(names):
        return Linear(torch.cat(weights).to(torch.bfloat16), bias)
    largest, smooth, device = scales.largest, scales.smooth.get(names[0]), bias.device
    factor = bias.new_ones(weights[0].shape[1]) if smooth is None else torch.from_numpy(smooth).to(device)  # [in]
    given = {(scales.activations.get(name), _bytes(scales.smooth.get(name))) for name in names}
    if len(given) > 1:
        raise ArtifactError(f"{', '.join(names)} read one tensor in several ways; quantize again: bertforge quantize")
    step = max(scales.activations[names[0]], _LEAST) / largest
    amax = [
        torch.from_numpy(np.asarray(scales.weights[name])).to(device)
        if name in scales.weights
        else (weight / factor).abs().amax(1)
        for name, weight in zip(names, weights, strict=True)
    ]
    steps = torch.cat(amax).clamp_min(_LEAST) / largest  # [out]
    stored = (torch.cat(weights) / factor / steps[:, None]).clamp(-largest, largest)
    stored = stored.round() if scales.format == "int8" else stored
    return Linear(stored.to(TYPES[scales.format]), bias, steps * step, factor / step)


def _bytes(array: np.ndarray | None) -> bytes | None:
    return None if array is None else array.tobytes()
