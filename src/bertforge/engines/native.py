"""Our own engine for NVIDIA GPUs: packs without padding, in bfloat16, 8-bit floating point or 8-bit integers.

The folder holds the weights (`native.weights`), `config.json`, and `engine.json`: how the products are best computed on
the GPU it was compiled for, and how long texts usually are. It can be compiled anywhere, and is proved where it runs:
on another GPU, and where there was none, `bertforge compile --verify` proves it.

At load the forward pass is recorded as CUDA graphs for packs of some sizes (`native.ladder`). Columns beside the text,
whose arrays have any width, are read behind the graph.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bertforge.artifact import write_json
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.columns.encoder import TabularEncoder
from bertforge.engines.base import BatchShape, Order, Target
from bertforge.engines.receipt import Product
from bertforge.errors import ArtifactError, MachineError, UsageError, is_out_of_memory
from bertforge.hardware import Hardware
from bertforge.kernels.attention import TRITON_HEAD_DIMS, Bounds
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from bertforge.native.choices import Choices
from bertforge.native.ladder import USUAL, Ladder, sizes
from bertforge.native.network import Network, Operations
from bertforge.native.plain import PlainOperations
from bertforge.native.variants import Variant, Variants
from bertforge.native.weights import TYPES, Linear, NativeWeights

log = logging.getLogger(__name__)
_SETTINGS = "engine.json"
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_SHORT = 0.1  # share of the texts that are shorter than what counts as usual
_CAPABILITIES = {"bf16": (8, 0), "int8": (8, 0), "fp8": (8, 9)}


def build(folder: Path, order: Order, hardware: Hardware) -> dict[str, Any]:
    """Writes the weights, their config and the settings.

    Raises UsageError for a model that the kernels do not compute.
    """
    _check_model(order.model.config)
    order.say("joining and rounding the weights")
    weights = NativeWeights.of(order.model, order.scales)
    weights.save(folder)
    usual = USUAL if order.lengths is None else max(1, int(np.quantile(order.lengths, _SHORT)))
    choices = Choices.known(hardware.name)
    if hardware.device.type == "cuda" and (missing := choices.unmeasured(weights)):
        from bertforge.native.operations_triton import seconds

        order.say(f"{hardware.name} is new: measuring how products are computed fastest, half a minute, once")
        choices = choices.with_measured(missing, partial(seconds, device=hardware.device))
        try:
            choices.keep()
        except OSError as error:
            order.say(f"what was measured stays in this engine alone, for it cannot be kept for others: {error}")
    write_json(folder / _SETTINGS, {"usual": usual, "device": choices.device, "choices": choices.found})
    return {}


class NativeEngine:
    """A folder that `build` wrote, on a GPU."""

    name = "native"
    packed = True
    streams = 2

    def __init__(self, folder: Path, precision: str, hardware: Hardware) -> None:
        """Loads and records. Raises ArtifactError for a damaged folder, MachineError for a lack of memory."""
        from bertforge.native.operations_triton import TritonOperations

        settings = _settings(folder)
        here = settings["device"] == hardware.name
        choices = Choices.from_dict(hardware.name, settings["choices"]) if here else Choices.known(hardware.name)
        self.device, self.precision = hardware.name, precision
        rungs = sizes(settings["usual"])
        edges, rows = zip(*((size.tokens, size.sequences) for size in rungs), strict=True)
        self.shape = BatchShape(edges[-1], rows=rows[-1], edges=edges, edge_rows=rows)
        self.network: Network | None
        self.ladder: Ladder | None
        with torch.inference_mode(), _enough_memory(hardware):
            weights = NativeWeights.load(folder, hardware.device)
            self.network = Network(weights, TritonOperations.on(hardware.device, choices))
            self.ladder = Ladder(self.network, rungs, self.streams)
        self.variants = Variants(weights)
        self.head = _Head(weights)
        if choices.unmeasured(weights):
            log.warning(
                "%s was compiled elsewhere, and how %s computes it fastest was not measured; compile it again here",
                folder,
                hardware.name,
            )

    @torch.inference_mode()
    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Engine`."""
        assert isinstance(batch, PackedBatch)
        return self.head(self.found(batch, self.variants.own), batch)

    def found(self, batch: PackedBatch, variant: Variant) -> np.ndarray:
        """What the network gives with a variant of its weights in place."""
        if self.ladder is None:
            raise UsageError("this engine was closed; load it again: Predictor.load(ENGINE)")
        return self.ladder(batch, partial(self.variants.put, variant))

    @torch.inference_mode()
    def beside(self, model: BertForSequenceClassification) -> NativeVariant:
        """See `base.Host`; in bf16 alone."""
        return NativeVariant(self, self.variants.of(model), _Head(NativeWeights.of(model, None)))

    @torch.inference_mode()
    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """See `base.Engine`: what is launched for `batch`, by the types of both operands."""
        assert isinstance(batch, PackedBatch)
        assert self.network is not None, "the engine is open"
        watched = _Watched(self.network.operations)
        run_once(Network(self.network.weights, watched), batch)
        return watched.products

    def close(self) -> None:
        """Drops the graphs and the memory that they write to."""
        self.ladder = self.network = None
        torch.cuda.empty_cache()


class NativeVariant:
    """Another model in a NativeEngine's place, while it computes."""

    name = "native"
    packed = True
    streams = NativeEngine.streams

    def __init__(self, engine: NativeEngine, variant: Variant, head: _Head) -> None:
        self.shape, self.device, self.precision = engine.shape, engine.device, engine.precision
        self._engine, self._variant, self._head = engine, variant, head

    @torch.inference_mode()
    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Engine`."""
        assert isinstance(batch, PackedBatch)
        return self._head(self._engine.found(batch, self._variant), batch)

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """See `base.Engine`."""
        return self._engine.products(batch)

    def close(self) -> None:
        """Its memory is the engine's."""


@contextmanager
def _enough_memory(hardware: Hardware) -> Iterator[None]:
    """Turns every way in which a GPU says that its memory is full into one MachineError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free, _ = torch.cuda.mem_get_info(hardware.device)
        raise MachineError(
            f"the engine does not fit into the memory of {hardware.name}, of which {free / 1e9:.1f} GB are free; "
            "end what else runs there (nvidia-smi lists it)"
        ) from error


class ExactEngine:
    """The same folder with nothing rounded but the weights: see `base.Target.exact`. On any device."""

    name, packed, streams = "native", True, 1
    shape = BatchShape(tokens=4096)

    def __init__(self, folder: Path, precision: str, hardware: Hardware) -> None:
        self.device, self.precision = hardware.name, precision
        self.network = Network(NativeWeights.load(folder, hardware.device), PlainOperations(rounding=False))
        self.head = _Head(self.network.weights)

    @torch.inference_mode()
    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Engine`."""
        assert isinstance(batch, PackedBatch)
        return self.head(run_once(self.network, batch).cpu().numpy(), batch)

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """None: all are in float32."""
        return []

    def close(self) -> None:
        """Nothing is held but the weights."""


def run_once(network: Network, batch: PackedBatch) -> torch.Tensor:
    """The network's result for a pack, launched operation by operation, in memory of its own."""
    device = network.weights.words.device
    numbers = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
    ids, positions, bounds = (part.to(device, torch.int32) for part in numbers)
    return network(ids, positions, bounds, network.room(len(ids), len(batch)))


class _Head:
    """Columns' branch and classifier of a model that reads columns: on the CPU, where the columns are."""

    def __init__(self, weights: NativeWeights) -> None:
        self.columns = None
        if weights.config.tabular is None:
            return
        head = {name: tensor.cpu() for name, tensor in weights.head.items()}
        self.columns = TabularEncoder(weights.config.tabular).eval()
        prefix = "tabular."
        own = {name.removeprefix(prefix): value for name, value in head.items() if name.startswith(prefix)}
        self.columns.load_state_dict(own)
        self.weight, self.bias = head["classifier.weight"], head["classifier.bias"]

    def __call__(self, found: np.ndarray, batch: PackedBatch) -> np.ndarray:
        """Logits `[sequences, labels]`, from what `Network` gives."""
        if self.columns is None:
            return found
        if batch.tabular is None:
            raise UsageError("this model reads columns beside the text, but the batch has none; set batch.tabular")
        features = torch.cat([torch.from_numpy(found), self.columns(batch.tabular)], dim=1)  # [sequences, features]
        logits: np.ndarray = F.linear(features, self.weight, self.bias).numpy()
        return logits


@dataclass
class _Watched:
    """Operations that tell what is launched, and pass everything on to `operations`."""

    operations: Operations
    products: list[Product] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operations, name)

    def product(self, x: Tensor, linear: Linear, out: Tensor) -> None:
        self._note("product", x, linear)
        self.operations.product(x, linear, out)

    def activated(self, x: Tensor, linear: Linear, activation: str, after: Linear, out: Tensor) -> None:
        self._note(f"product and {activation}", x, linear)
        self.operations.activated(x, linear, activation, after, out)

    def attend(
        self, projections: tuple[Tensor, Tensor, Tensor], affine: Tensor, bounds: Bounds, after: Linear, out: Tensor
    ) -> None:
        query, key, _ = projections
        pairs = int((bounds.queries.diff() * bounds.keys.diff()).sum())
        multiply_adds = 2 * pairs * query.shape[1] * query.shape[2]
        self.products.append(Product("attention", _NAMES[key.dtype], multiply_adds, attention=True, fused=True))
        self.operations.attend(projections, affine, bounds, after, out)

    def _note(self, name: str, x: Tensor, linear: Linear) -> None:
        assert x.dtype == linear.weight.dtype, "both operands of a product have one type"
        out, width = linear.weight.shape
        self.products.append(Product(f"{name} {width} to {out}", _NAMES[x.dtype], len(x) * out * width))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); compile it again: bertforge compile") from error
    return found


def _check_model(config: BertConfig) -> None:
    widths = config.hidden_size % 16 == config.intermediate_size % 16 == 0
    if config.head_dim not in TRITON_HEAD_DIMS or not widths:
        raise UsageError(
            f"native computes heads of {' or '.join(map(str, sorted(TRITON_HEAD_DIMS)))} and widths that 16 divides; "
            f"this model has heads of {config.head_dim}, and widths of {config.hidden_size} and "
            f"{config.intermediate_size}: take another --target"
        )


def _unfit(hardware: Hardware) -> str | None:
    if hardware.capability:
        least = min(_CAPABILITIES.values())
        needed, here = (".".join(map(str, pair)) for pair in (least, hardware.capability))
        if hardware.capability >= least:
            return None
        return f"it needs a GPU of compute capability {needed} (Ampere) or later, and {hardware.name} has {here}"
    found = f"it runs on an NVIDIA GPU, and the device here is {hardware.name}"
    if torch.version.cuda and (problem := _driver_problem()):
        found += f" ({problem})"
    return found


def _driver_problem() -> str:
    """Why a PyTorch that was built for CUDA finds no GPU: no driver, or one that is too old."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].strip()
    return ""


TARGET = Target(
    name="native",
    precisions=("bf16", "int8", "fp8"),
    libraries=("triton",),
    extra="native",
    about="our own engine for NVIDIA GPUs, from compute capability 8.0 on",
    build=build,
    open=NativeEngine,
    exact=ExactEngine,
    rest=lambda hardware: "bf16",
    stores="bf16",
    capabilities=_CAPABILITIES,
    unfit=_unfit,
    calibrates=("int8", "fp8"),
    compiles_at_load=True,
    hosts=("bf16",),
)
