"""OpenVINO on a CPU: one stream a core, each with a request of its own; for a question that comes alone, every core.

Measured on a 2-core Xeon with AMX (2026-11-23, all-MiniLM-L6-v2, 240 questions of real lengths, one core, bfloat16):
batches of one row 92 questions/s, of one row with lengths rounded to 16 tokens 106, of 2,048 tokens 128, of 4,096
tokens 111. A new shape costs some milliseconds of kernel generation, which rounding saves; beyond 2,048 tokens the
activations leave the cache. A single row waits 5.2 ms in INT8 where both cores work on it, 9.0 ms on one core's stream
(medians of 60 rows); batches gain nothing from it: 1.2 times slower.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.backends.base import BatchShape
from bertforge.backends.feeds import feeds
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.streaming import in_a_thread
from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import Hardware

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # int8 stands in the graph; the hint is for what is left


class OpenVinoBackend:
    """`model.xml` or `model.onnx`, compiled for this CPU when it is loaded."""

    name = "openvino"
    packed = False
    shape = BatchShape(tokens=2048, multiple=16)

    def __init__(self, path: Path, hardware: Hardware, precision: str) -> None:
        """Raises MachineError without the library, ArtifactError for a damaged file."""
        try:
            import openvino
        except ImportError:
            raise MachineError("openvino is not installed; pip install 'bertforge[openvino]'") from None
        self.streams = hardware.cores
        self.device, self.precision = hardware.name, precision
        hint = HINTS[precision] if hardware.bf16 else "f32"
        settings = {"INFERENCE_NUM_THREADS": hardware.cores, "INFERENCE_PRECISION_HINT": hint}

        def compile_both() -> list[Any]:
            core = openvino.Core()
            streams = dict.fromkeys((self.streams, 1))  # once, where there is one core
            return [core.compile_model(str(path), "CPU", {"NUM_STREAMS": count, **settings}) for count in streams]

        try:
            compiled = in_a_thread(compile_both)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArtifactError(f"{path} cannot be loaded ({reason}); compile it again: bertforge compile") from error
        self.compiled, self.alone = compiled[0], compiled[-1]
        self.names = {name for value in self.compiled.inputs for name in value.get_names()}
        self.requests = threading.local()

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Backend`."""
        arrays = feeds(batch, self.names)
        kind = "alone" if len(arrays["input_ids"]) == 1 else "compiled"
        if not hasattr(self.requests, kind):
            setattr(self.requests, kind, getattr(self, kind).create_infer_request())
        found: np.ndarray = getattr(self.requests, kind).infer(arrays)["logits"].copy()
        return found

    def close(self) -> None:
        """Drops the compiled models."""
        self.compiled, self.alone, self.requests = None, None, threading.local()
