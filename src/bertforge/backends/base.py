"""What every engine is to the code above it: batches in, logits out, and how it likes its batches.

`shape` and `streams` are the engine's own measured preference: rows of like length, `tokens` padded tokens a batch,
lengths rounded up to a multiple (an engine prepares kernels for each new shape, so a few shapes are better than many),
and how many calls may run at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bertforge.backends.receipt import Product
from bertforge.batch import PackedBatch, PaddedBatch


@dataclass(frozen=True)
class BatchShape:
    """How rows are grouped: `rows` a batch at most, and as many as fit into `tokens` with their padding."""

    tokens: int
    rows: int | None = None
    multiple: int = 1
    """Lengths are padded up to a multiple of this many tokens."""
    edges: tuple[int, ...] = ()
    """Where there are any, lengths are padded up to the next of these instead; ascending."""
    filled: bool = False
    """A batch, unless it is one row alone, is padded to as many rows as fit into `tokens`."""

    def padded(self, length: int) -> int:
        """Tokens a row takes in a batch whose longest row has `length`."""
        return next((edge for edge in self.edges if edge >= length), -(-length // self.multiple) * self.multiple)

    def computed(self, rows: int, length: int) -> int:
        """Tokens that a batch of `rows` takes, padding included, when its longest row has `length`."""
        width = self.padded(length)
        return width * (max(rows, self.tokens // width) if self.filled and rows > 1 else rows)


class Backend(Protocol):
    """One loaded model."""

    name: str
    """pytorch, onnxruntime, openvino, tensorrt, tensorrt-rtx."""
    precision: str
    """What its matrix products run in, as far as it was asked for: fp32, fp16, bf16, int8, fp8."""
    device: str
    """Product name."""
    packed: bool
    """True takes `PackedBatch`, false `PaddedBatch`."""
    shape: BatchShape
    streams: int
    """Calls of `logits` that may run at the same time, each from a thread of its own."""

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """`[sequences, labels]` float32 on the host: the call returns when the work is done."""
        ...

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """The matrix products that run for `batch`, as the engine tells; empty where it cannot."""
        ...

    def close(self) -> None:
        """Gives memory and threads back."""
        ...
