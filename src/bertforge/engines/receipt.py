"""Which precision an engine's matrix products really run in, as the engine itself tells after it ran.

An "INT8" engine may well compute in float32: a layer that is not fused as hoped, a CPU without the instruction, a layer
that was spared. So the label is earned: below `EARNED` of the linear layers' multiply-adds in the precision asked for,
the engine is `mixed`. It is kept all the same, for it was shown to be right and may be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EARNED = 0.8


@dataclass(frozen=True)
class Product:
    """One matrix product that ran, or one fused attention, which is two of them."""

    name: str
    """The engine's own."""
    precision: str
    """fp32, bf16, fp16, int8 or fp8: what goes into the product."""
    multiply_adds: int
    attention: bool = False
    """Of two activations: queries and keys, or shares and values."""
    fused: bool = False
    """Both products of attention and the softmax between them, as one kernel."""


def describe(products: Sequence[Product], precision: str, tokens: int) -> dict[str, Any]:
    """The receipt's part on `products`, not empty, of one text of `tokens` in an engine built for `precision`."""
    linear = [product for product in products if not product.attention]
    attention = [product for product in products if product.attention]
    share = shares(linear).get(precision, 0.0)
    return {
        "label": precision if share >= EARNED else "mixed",
        "tokens": tokens,
        "multiply_adds": sum(product.multiply_adds for product in products),
        "shares": shares(products),
        "linear_shares": shares(linear),
        "attention_shares": shares(attention),
        "attention_fused": all(product.fused for product in attention) if attention else None,
    }


def shares(products: Sequence[Product]) -> dict[str, float]:
    """Precision -> share of the multiply-adds, the largest first."""
    total = sum(product.multiply_adds for product in products)
    found = {
        precision: sum(product.multiply_adds for product in products if product.precision == precision) / total
        for precision in {product.precision for product in products}
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def verdict(described: dict[str, Any], precision: str) -> str:
    """One line on what `describe` found."""
    shown = " and ".join(
        f"{share:.0%} in {name}" for name, share in described["linear_shares"].items() if share > 0.005
    )
    attention = {True: "fused", False: "not fused", None: "not seen"}[described["attention_fused"]]
    line = f"linear layers run {shown} (by multiply-adds); attention is {attention}"
    if described["label"] == "mixed":
        line += f"; less than {EARNED:.0%} in {precision}, so the engine counts as mixed, not as {precision}"
    return line
