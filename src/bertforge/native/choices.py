"""How each product of the GPU engine is best computed on a GPU: by cuBLAS, or by our kernel with which tiling.

That depends on the GPU, on the type, on the product's shape and on how many tokens there are; by how much is 10 to 40%.
It is measured once. For GPUs that we have measured it stands in `choices.json`; on another `bertforge compile` measures
it, and keeps it in the user's cache for the next engine. An engine has a copy in its folder, so that nothing is ever
measured while somebody waits for an answer. Where nothing was measured, there are choices that run on every GPU.

A product is named after what it does, its type and its shape, `activated fp8 3072x768`; without the shape it stands for
shapes that were not measured.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Self

from bertforge.artifact import write_json
from bertforge.errors import MachineError
from bertforge.native.weights import Linear, NativeWeights

Choice = tuple[int, ...] | None
"""The numbers of a `linear_gelu_triton.Tiling`; None is cuBLAS."""
SIZES = (256, 4096)
"""Up to so many tokens a pack is small, and middling; three choices in all."""
MEASURED = (128, 2048, 16_384)
"""Tokens at which they are measured."""
_FILE = "choices.json"
_ANY = "any"
_NARROW = ((64, 64, 128, 8, 4, 4, 1), (64, 32, 256, 8, 4, 3, 1), (64, 32, 128, 8, 4, 4, 2), (64, 64, 64, 8, 4, 4, 2))
_WIDE = {
    "bf16": ((128, 256, 64, 8, 8, 3, 1), (128, 128, 64, 8, 4, 4, 2), (128, 128, 32, 8, 4, 4, 2)),
    "8 bits": ((128, 256, 128, 8, 8, 3, 1), (128, 128, 128, 8, 4, 3, 2), (128, 128, 64, 8, 4, 4, 2)),
}
"""What is tried, from a few dozen that were on an H200; the last of each fits into smaller GPUs' shared memory."""


@dataclass(frozen=True)
class Choices:
    """Those of one GPU."""

    device: str
    """Its product name."""
    found: dict[str, list[Choice]]
    """Name of a product -> the choice for a small, a middling and a large pack."""

    @classmethod
    def known(cls, device: str) -> Self:
        """Those that came with bertforge, or else were measured by this user, if any were."""
        shipped = _shipped().get(device)
        if isinstance(shipped, str):  # another GPU with the same processor
            shipped = _shipped()[shipped]
        return cls.from_dict(device, _cached(device) if shipped is None else shipped)

    @classmethod
    def from_dict(cls, device: str, found: dict[str, Any]) -> Self:
        """From JSON, as `found` is written."""
        return cls(device, {name: [each and tuple(each) for each in three] for name, three in found.items()})

    def of(self, kind: str, linear: Linear, tokens: int) -> Choice:
        """Of what `products` names so, for a pack of so many tokens."""
        name = f"{kind} {linear.form}"
        three = self.found.get(f"{name} {_shape(linear)}") or self.found.get(name)
        if three is None:
            three = self.from_dict("", _shipped()[_ANY]).found[name]
        return three[sum(tokens > size for size in SIZES)]

    def unmeasured(self, weights: NativeWeights) -> list[tuple[str, Linear]]:
        """The products of a model for which what runs everywhere would be taken."""
        return [(kind, linear) for kind, linear in products(weights) if f"{kind} {linear.form}" not in self.found]

    def with_measured(
        self, wanted: list[tuple[str, Linear]], seconds: Callable[[str, Linear, int, Choice], float]
    ) -> Self:
        """With the fastest choices for `wanted`, by the `seconds` of a product, infinite where it cannot run.

        Raises MachineError where a product runs in no way at all.
        """
        found = dict(self.found)
        for kind, linear in wanted:
            name, shape = f"{kind} {linear.form}", _shape(linear)
            if f"{name} {shape}" in found:
                continue
            best = []
            for tokens in MEASURED:
                took = {way: seconds(kind, linear, tokens, way) for way in _ways(kind, linear.form)}
                best.append(min(took, key=lambda way: took[way]))
                if took[best[-1]] == math.inf:
                    raise MachineError(f"{self.device} computes no {name} of {shape}; take another --precision")
            found[f"{name} {shape}"] = best
            found.setdefault(name, best)
        return type(self)(self.device, found)

    def keep(self) -> None:
        """Writes them into the user's cache; raises OSError where that cannot be written."""
        _cache(self.device).parent.mkdir(parents=True, exist_ok=True)
        write_json(_cache(self.device), self.found)


def products(weights: NativeWeights) -> Iterator[tuple[str, Linear]]:
    """What is computed for each product of a model: the product alone, activated, or pooled; and its weights."""
    for layer in weights.layers:
        yield from (("product", layer.qkv), ("product", layer.attended), ("activated", layer.up))
        yield "product", layer.down
    yield "pooled", weights.pooler


def _ways(kind: str, form: str) -> list[Choice]:
    ways: list[Choice] = [*_NARROW, *_WIDE["bf16" if form == "bf16" else "8 bits"]]
    return [None, *ways] if kind == "product" and form != "int8" else ways


@cache
def _shipped() -> dict[str, Any]:
    """Name of a GPU -> its choices, or the name of one with the same processor."""
    found: dict[str, Any] = json.loads(resources.files("bertforge.native").joinpath(_FILE).read_text())
    return found


def _shape(linear: Linear) -> str:
    out, width = linear.weight.shape
    return f"{out}x{width}"


def _cached(device: str) -> dict[str, Any]:
    """What this user has measured; nothing where it cannot be read, or an older version wrote it."""
    try:
        found: dict[str, Any] = json.loads(_cache(device).read_text())
        sound = all(
            len(three) == 3 and all(each is None or len(each) == 7 for each in three) for three in found.values()
        )
        return found if sound else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _cache(device: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    return Path(root) / "bertforge" / f"{name}.json"
