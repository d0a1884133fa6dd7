"""OpenVINO on a CPU: one stream a core, each with a request of its own.

Measured on a 2-core Xeon with AMX (2026-11-23, all-MiniLM-L6-v2, 240 questions of real lengths, one core, bfloat16):
batches of one row 92 questions/s, of one row with lengths rounded to 16 tokens 106, of 2,048 tokens 128, of 4,096
tokens 111. A new shape costs some milliseconds of kernel generation, which rounding saves; beyond 2,048 tokens the
activations leave the cache.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
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
        self.path = path
        self.settings: dict[str, Any] = {
            "NUM_STREAMS": self.streams,
            "INFERENCE_NUM_THREADS": hardware.cores,
            "INFERENCE_PRECISION_HINT": hint,
        }
        try:
            self.compiled: Any = in_a_thread(lambda: openvino.Core().compile_model(str(path), "CPU", self.settings))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArtifactError(f"{path} cannot be loaded ({reason}); compile it again: bertforge compile") from error
        self.names = {name for value in self.compiled.inputs for name in value.get_names()}
        self.requests = threading.local()

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Backend`."""
        if not hasattr(self.requests, "own"):
            self.requests.own = self.compiled.create_infer_request()
        found: np.ndarray = self.requests.own.infer(feeds(batch, self.names))["logits"].copy()
        return found

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """See `base.Backend`. One stream, for each has a graph of its own, and only the one that ran has shapes."""
        import openvino

        settings = {**self.settings, "NUM_STREAMS": 1}
        compiled: Any = in_a_thread(lambda: openvino.Core().compile_model(str(self.path), "CPU", settings))
        request = compiled.create_infer_request()
        request.infer(feeds(batch, self.names))
        tokens = int(batch.input_ids.shape[-1])
        found = (_product(node, tokens) for node in compiled.get_runtime_model().get_ordered_ops())
        return [product for product in found if product is not None]

    def close(self) -> None:
        """Drops the compiled model."""
        self.compiled, self.requests = None, threading.local()


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
