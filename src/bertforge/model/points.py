"""What can be quantized in a BERT: the inputs of matrix products, grouped by layer and component.

A point is one tensor on its way into a product: the input of a linear layer, named as the layer is, or one of the four
operands of attention's own two products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bertforge.model.config import BertConfig

PRODUCTS = ("query_out", "key_out", "shares", "value_out")
"""Operands of attention: scaled queries and keys, then softmax's shares and values."""
COMPONENTS = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention-output": ("attention.output.dense",),
    "ffn-up": ("intermediate.dense",),
    "ffn-down": ("output.dense",),
    "attention-products": tuple(f"attention.self.{name}" for name in PRODUCTS),
}
PRESETS = {
    "ffn": ("ffn-up", "ffn-down"),
    "projections": ("qkv", "attention-output", "ffn-up", "ffn-down"),
    "attention": tuple(COMPONENTS),
}
"""From the safest to all; LayerNorm, softmax, GELU and the head are never quantized."""


@dataclass(frozen=True)
class Unit:
    """One component of one layer: what is quantized, or not, as a whole."""

    layer: int
    component: str

    def __str__(self) -> str:
        return f"{self.component} of layer {self.layer}"

    @property
    def points(self) -> tuple[str, ...]:
        """Names of its points in the model."""
        return tuple(f"bert.encoder.layer.{self.layer}.{name}" for name in COMPONENTS[self.component])

    def work(self, config: BertConfig, length: float) -> float:
        """Multiply-adds for one token of a sequence of `length` tokens."""
        hidden, wide = config.hidden_size, config.intermediate_size
        return {
            "qkv": 3.0 * hidden * hidden,
            "attention-output": float(hidden * hidden),
            "ffn-up": float(hidden * wide),
            "ffn-down": float(hidden * wide),
            "attention-products": 2.0 * hidden * length,
        }[self.component]


def units(config: BertConfig, preset: str) -> list[Unit]:
    """Every unit of a preset, layer by layer."""
    return [Unit(layer, component) for layer in range(config.num_hidden_layers) for component in PRESETS[preset]]


def shared(chosen: Iterable[Unit], ranges: dict[str, float]) -> dict[str, float]:
    """`ranges` of points, with one range for query, key and value, which read the same values.

    They differ otherwise in the last layer, where first tokens alone ask.
    """
    found = dict(ranges)
    for unit in chosen:
        if unit.component == "qkv":
            found |= dict.fromkeys(unit.points, max(ranges[point] for point in unit.points))
    return found


def linears(chosen: Iterable[Unit]) -> list[str]:
    """Names of the linear layers among the points of `chosen` units."""
    return [point for unit in chosen for point in unit.points if not point.endswith(PRODUCTS)]


def share_of_work(config: BertConfig, chosen: list[Unit], length: float) -> float:
    """Share of the encoder's multiply-adds that `chosen` units do."""
    everything = sum(unit.work(config, length) for unit in units(config, "attention"))
    return sum(unit.work(config, length) for unit in chosen) / everything
