"""How each product of the GPU engine is best computed on a GPU: by cuBLAS, or by our kernel with which tiling.

That depends on the GPU, on the type, on the product's shape and on how many tokens there are; by how much is 10 to 40%.
It is measured once. For GPUs that we have measured it stands in `choices.json`; on another `bertforge compile` measures
it, and keeps it in the user's cache for the next engine. An engine has a copy in its folder, so that nothing is ever
measured while somebody waits for an answer.

A product is named after what it does, its type and its shape, `activated fp8 3072x768`; without the shape it stands for
shapes that were not measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
_CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "few": ((64, 64, 128, 8, 4, 4, 1), (64, 32, 256, 8, 4, 3, 1), (64, 32, 128, 8, 4, 4, 2), (64, 64, 64, 8, 4, 4, 2)),
    "bf16": ((128, 256, 64, 8, 8, 3, 1), (128, 128, 64, 8, 4, 4, 2), (128, 128, 32, 8, 4, 4, 2)),
    "8 bits": ((128, 256, 128, 8, 8, 3, 1), (128, 128, 128, 8, 4, 3, 2), (128, 128, 64, 8, 4, 4, 2)),
}
"""From a few dozen that were tried on an H200; the last of each fits into the shared memory of smaller GPUs."""


@dataclass(frozen=True)
class Choices:
    """Those of one GPU."""

    device: str
    """Its product name."""
    found: dict[str, tuple[Choice, Choice, Choice]]
    """Name of a product -> the choice for a small, a middling and a large pack."""

    def of(self, kind: str, linear: Linear, tokens: int) -> Choice:
        """For a product or activated product, by `network.Operations`' names."""
        name = f"{kind} {linear.form}"
        choices = self.found.get(f"{name} {_shape(linear)}") or self.found[name]
        return choices[sum(tokens > size for size in SIZES)]

    def covers(self, weights: NativeWeights) -> bool:
        """Whether there is a choice for every product of a model."""
        return all(f"{kind} {linear.form}" in self.found for kind, linear in products(weights))

    @classmethod
    def known(cls, device: str) -> Self | None:
        """Those that came with bertforge or were measured by this user."""
        shipped, own = _shipped(), _cache(device)
        if found := shipped.get(device):
            return cls.from_dict(device, shipped[found] if isinstance(found, str) else found)
        return cls.from_dict(device, json.loads(own.read_text())) if own.is_file() else None

    @classmethod
    def best_known(cls, device: str) -> Self:
        """`known`, or for a GPU that was never measured what runs on every one."""
        return cls.known(device) or cls.from_dict(device, _shipped()[_ANY])

    @classmethod
    def from_dict(cls, device: str, found: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        made = {name: tuple(choice and tuple(choice) for choice in three) for name, three in found.items()}
        return cls(device, made)  # type: ignore[arg-type]  # three of them

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: [choice and list(choice) for choice in three] for name, three in self.found.items()}

    def keep(self) -> None:
        """Writes them into the user's cache."""
        _cache(self.device).parent.mkdir(parents=True, exist_ok=True)
        write_json(_cache(self.device), self.to_dict())


def products(weights: NativeWeights) -> Iterator[tuple[str, Linear]]:
    """What is computed for each product of a model, and its weights."""
    for layer in weights.layers:
        yield from (
            ("product", layer.qkv),
            ("product", layer.attended),
            ("activated", layer.up),
            ("product", layer.down),
        )


def measure(weights: NativeWeights, device: str, seconds: Callable[[str, Linear, int, Choice], float]) -> Choices:
    """The fastest choice for each shape and size, by `seconds` of a product, infinite where it cannot run.

    Raises MachineError where a product runs in no way at all.
    """
    found: dict[str, tuple[Choice, ...]] = {}
    for kind, linear in products(weights):
        name = f"{kind} {linear.form}"
        if f"{name} {_shape(linear)}" in found:
            continue
        ways: list[Choice] = [*_CANDIDATES["few"], *_CANDIDATES["bf16" if linear.form == "bf16" else "8 bits"]]
        if kind == "product" and linear.form != "int8":
            ways.insert(0, None)
        best = []
        for tokens in MEASURED:
            took = {way: seconds(kind, linear, tokens, way) for way in ways}
            best.append(min(took, key=lambda way: took[way]))
            if took[best[-1]] == float("inf"):
                raise MachineError(f"{device} computes no {name} of {_shape(linear)}; take another --precision")
        found[f"{name} {_shape(linear)}"] = tuple(best)
        found.setdefault(name, tuple(best))
    return Choices(device, found)  # type: ignore[arg-type]  # three of them


def _shipped() -> dict[str, Any]:
    """Name of a GPU -> its choices, or the name of one with the same processor."""
    found: dict[str, Any] = json.loads(resources.files("bertforge.native").joinpath(_FILE).read_text())
    return found


def _shape(linear: Linear) -> str:
    out, width = linear.weight.shape
    return f"{out}x{width}"


def _cache(device: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    return Path(root) / "bertforge" / f"{name}.json"
