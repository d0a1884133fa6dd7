"""OpenVINO on a CPU: one stream a core, each with a request of its own; for a question that comes alone, every core.

Alone is a row that comes while no other call is running.

Measured on a 2-core Xeon with AMX (2026-11-23, all-MiniLM-L6-v2, 240 questions of real lengths, one core, bfloat16):
batches of one row 92 rows/s, of one row with lengths rounded to 16 tokens 106, of 2,048 tokens 128, of 4,096
tokens 111. A new shape costs some milliseconds of kernel generation, which rounding saves; beyond 2,048 tokens the
activations leave the cache. A single row waits 5.2 ms in INT8 where both cores work on it, 9.0 ms on one core's stream
(medians of 60 rows); batches gain nothing from it: 1.2 times slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np

from bertforge.backends.base import BatchShape
from bertforge.backends.feeds import feeds
from bertforge.backends.receipt import Product
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.streaming import in_a_thread
from bertforge.errors import ArtifactError
from bertforge.hardware import Hardware

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # int8 stands in the graph; the hint is for what is left

_PRECISIONS = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}


class OpenVinoBackend:
    """`model.xml` or `model.onnx`, compiled for this CPU when it is loaded."""

    name = "openvino"
    packed = False
    shape = BatchShape(tokens=2048, multiple=16)

    def __init__(self, path: Path, hardware: Hardware, precision: str) -> None:
        """Raises ArtifactError for a damaged file."""
        import openvino

        self.streams = hardware.cores
        self.device, self.precision = hardware.name, precision
        hint = HINTS[precision] if hardware.bf16 else "f32"
        settings = {"INFERENCE_NUM_THREADS": hardware.cores, "INFERENCE_PRECISION_HINT": hint}

        def compiled(streams: int) -> Any:
            return openvino.Core().compile_model(str(path), "CPU", {"NUM_STREAMS": streams, **settings})

        try:
            many = in_a_thread(lambda: compiled(self.streams))
            self.single = in_a_thread(lambda: compiled(1)) if self.streams > 1 else many
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArtifactError(f"{path} cannot be loaded ({reason}); compile it again: bertforge compile") from error
        self.names = {name for value in many.inputs for name in value.get_names()}
        self.requests, self.alone = _requests(many, self.streams), _requests(self.single, 1)
        self.running, self.lock = 0, Lock()

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Backend`."""
        arrays = feeds(batch, self.names)
        with self._request(len(arrays["input_ids"])) as request:
            found: np.ndarray = request.infer(arrays)["logits"].copy()
        return found

    @contextmanager
    def _request(self, rows: int) -> Iterator[Any]:
        """A request that nobody else uses, for a batch of `rows`."""
        with self.lock:
            requests = self.alone if rows == 1 and self.running == 0 else self.requests
            self.running += 1
        request = requests.get()
        try:
            yield request
        finally:
            requests.put(request)
            with self.lock:
                self.running -= 1

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """See `base.Backend`. Of the model with one stream, for each stream has a graph of its own."""
        self.single.create_infer_request().infer(feeds(batch, self.names))
        tokens = int(batch.input_ids.shape[-1])
        found = (_product(node, tokens) for node in self.single.get_runtime_model().get_ordered_ops())
        return [product for product in found if product is not None]

    def close(self) -> None:
        """Drops the requests, and the compiled models with them."""
        self.single, self.requests, self.alone = None, SimpleQueue(), SimpleQueue()


def _requests(compiled: Any, count: int) -> SimpleQueue[Any]:
    """Made here and not by the threads that use them: two made at once may hang."""
    requests = SimpleQueue[Any]()
    for _ in range(count):
        requests.put(compiled.create_infer_request())
    return requests


def _product(node: Any, tokens: int) -> Product | None:
    """A node of the runtime model, which ran a text of `tokens`, as a product, if it is one."""
    kind, precision, made_of = (
        node.get_rt_info()[name].astype(str) for name in ("layerType", "runtimePrecision", "originalLayersNames")
    )
    fused = "/Softmax_" in made_of and "/MatMul_" in made_of
    if kind not in ("FullyConnected", "MatMul") and not fused:
        return None
    out = list(node.output(0).get_shape())
    terms = 2 * tokens if fused else list(node.input(0).get_shape())[-1]
    attention = len(out) == 4  # [batch, heads, queries, ...]
    return Product(
        node.get_friendly_name(), _PRECISIONS.get(precision, precision), math.prod(out) * terms, attention, fused
    )
