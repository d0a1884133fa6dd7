"""What an engine is to the code above it: a target builds a folder and opens it, an engine turns batches into logits.

A target is the kind (OpenVINO, ONNX Runtime, ...): a file of its own beside this one, which owns what it computes in,
where it runs, how it is installed, built and opened. `registry.TARGETS` lists them, and nothing else names one.

`shape` and `streams` are an engine's own measured preference: rows of like length, `tokens` padded tokens a batch,
lengths rounded up to a multiple (an engine prepares kernels for each new shape, so a few shapes are better than many),
and how many calls may run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.loader import Examples
from bertforge.engines.receipt import Product
from bertforge.hardware import Hardware
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.scales import Scales


@dataclass(frozen=True)
class BatchShape:
    """How rows are grouped: `rows` a batch at most, and as many as fit into `tokens` with their padding."""

    tokens: int
    rows: int | None = None
    multiple: int = 1
    """Lengths, or packs, are padded up to a multiple of this many tokens."""
    edges: tuple[int, ...] = ()
    """Where there are any, they are padded up to the next of these instead; ascending."""
    edge_rows: tuple[int, ...] = ()
    """How many rows fit into a pack of each of `edges`; any number, where it is empty."""
    filled: bool = False
    """A batch, unless it is one row alone, is padded to as many rows as fit into `tokens`."""

    def padded(self, length: int, rows: int = 1) -> int:
        """Tokens that a row takes in a batch whose longest has `length`, or a pack of `rows` with `length` tokens."""
        most = self.edge_rows or (rows,) * len(self.edges)
        fitting = (edge for edge, fit in zip(self.edges, most, strict=True) if edge >= length and fit >= rows)
        return next(fitting, -(-length // self.multiple) * self.multiple)

    def computed(self, rows: int, length: int) -> int:
        """Tokens that a batch of `rows` takes, padding included, when its longest row has `length`."""
        width = self.padded(length)
        return width * (max(rows, self.tokens // width) if self.filled and rows > 1 else rows)


class Engine(Protocol):
    """One loaded model."""

    name: str
    """pytorch, or the target's."""
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


@runtime_checkable
class Host(Protocol):
    """An engine that computes other models of its base too, without another copy of what they share."""

    def beside(self, model: BertForSequenceClassification) -> Engine:
        """An engine of a plain `model` in float32, with the shape, streams and precision of this one, whose threads
        they share. Raises UsageError for a model that shares nothing or does not fit."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows of prepared data for one purpose."""

    examples: Examples
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """[rows]."""
        return np.asarray(self.examples.labels[self.rows])

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Order:
    """The engine that is wanted."""

    precision: str
    """Of the products: fp32, fp16, bf16, or int8 and fp8."""
    model: BertForSequenceClassification
    """Plain: no adapters, no simulated quantization."""
    longest: int
    """Tokens of the longest text."""
    scales: Scales | None = None
    """8-bit ranges, which stand in the graph; None leaves int8 to a target that is `dynamic`."""
    spared: tuple[str, ...] = ()
    """Linear layers that such a target leaves out of its 8 bits."""
    lengths: np.ndarray | None = None
    """Tokens of real rows, for a target that is built for fixed shapes."""
    older: Path | None = None
    """The folder of an earlier engine in this one's place, for a target that takes over what still fits."""
    say: Callable[[str], object] = lambda text: None
    """Told each stage."""


@dataclass(frozen=True)
class TritonBackend:
    """How NVIDIA's Triton Inference Server runs an engine's files."""

    name: str
    """Of the backend."""
    files: tuple[str, ...]
    """Those that the server reads."""
    precisions: tuple[str, ...]
    """Those that the server computes in as the engine does."""
    batches: bool
    """Whether the backend takes batches that the server made of several requests; else each request is a batch."""
    streams: str = ""
    """The backend's parameter for `Engine.streams`."""


def _anywhere(hardware: Hardware) -> str | None:
    return None


@dataclass(frozen=True)
class Target:
    """A kind of engine that `bertforge compile` builds."""

    name: str
    precisions: tuple[str, ...]
    libraries: tuple[str, ...]
    """Modules to import, all of them."""
    extra: str
    """Of bertforge, which installs them."""
    about: str
    """What it is for, in a few words for `bertforge doctor`."""
    build: Callable[[Path, Order, Hardware], dict[str, Any]]
    """Writes an engine into an empty folder; returns what its receipt says beyond what all receipts say."""
    open: Callable[[Path, str, Hardware], Engine]
    """The engine in a folder, of a precision, ready to run."""
    exact: Callable[[Path, str, Hardware], Engine | None]
    """As `open`, but nothing is rounded on the way: weights as they are stored, arithmetic in float32, and activations
    clamped and scaled as the engine does it, for a wrong range or zero point must show.
    It gives None where an engine's files cannot be read so: then no probe shows that every part is there."""
    rest: Callable[[Hardware], str]
    """The type that an engine of 8 bits computes all else in."""
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Type of device -> those of `precisions` it runs, none where it does not run; all where it is not named."""
    capabilities: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Precision -> the CUDA compute capability that a GPU needs for it; any, where it is not named."""
    unfit: Callable[[Hardware], str | None] = _anywhere
    """Why none of its engines runs on this machine; None where they do."""
    stores: str = "fp32"
    """The type of the weights in its files that are not in 8 bits, as `exact` reads them."""
    calibrates: tuple[str, ...] = ("int8",)
    """8 bits that it has of a plain model; others come from a quantized one alone."""
    dynamic: bool = False
    """Quantizes a plain model's activations as they come, and needs no ranges for it."""
    builds_where_it_runs: bool = False
    """Builds nothing on a machine that is `unfit`."""
    renewable: bool = False
    """A newer version of its library makes an engine useless, so a new one may take its place."""
    changing: tuple[str, ...] = ()
    """Files of an engine that change as it is used."""
    compiles_at_load: bool = False
    """What runs is made anew for each device: what was proved on one says nothing of another."""
    hosts: tuple[str, ...] = ()
    """Precisions in which its engines are a `Host`."""
    triton: TritonBackend | None = None
    """None where Triton does not run its files."""

    def on(self, hardware: Hardware) -> tuple[str, ...]:
        """What it computes in on a device."""
        here, have = self.only.get(hardware.device.type, self.precisions), hardware.capability
        return tuple(name for name in here if have is None or have >= self.capabilities.get(name, have))

    @property
    def installed(self) -> bool:
        """Whether its libraries are there."""
        return all(util.find_spec(name) for name in self.libraries)

    @property
    def hint(self) -> str:
        """The command that installs them."""
        return f"pip install 'bertforge[{self.extra}]'"


def feeds(batch: PaddedBatch | PackedBatch, names: Container[str]) -> dict[str, np.ndarray]:
    """The inputs among `names` as arrays, as `export.bert_onnx` declares them."""
    assert isinstance(batch, PaddedBatch)
    tensors = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.tabular is not None:
        tensors |= batch.tabular
    return {name: tensor.numpy() for name, tensor in tensors.items() if name in names}
