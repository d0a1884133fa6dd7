"""ONNX Runtime on a CPU or a CUDA device: one session, inputs by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bertforge.backends.base import BatchShape
from bertforge.backends.feeds import feeds
from bertforge.backends.receipt import Product
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import Hardware

_INT8 = {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
_FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
_PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class OnnxRuntimeBackend:
    """`model.onnx` in a session with every core's threads."""

    name = "onnxruntime"
    packed = False
    streams = 1

    def __init__(self, path: Path, hardware: Hardware, precision: str) -> None:
        """Raises MachineError without the CUDA provider, ArtifactError for a damaged file."""
        import onnxruntime as ort

        cuda = hardware.device.type == "cuda"
        provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        if provider not in ort.get_available_providers():
            raise MachineError("this onnxruntime has no CUDA provider; pip install onnxruntime-gpu")
        self.path, self.provider = path, provider
        self.shape = BatchShape(tokens=16_384, rows=32) if cuda else BatchShape(tokens=2048, multiple=8)
        self.device, self.precision = hardware.name, precision
        try:
            self.session: Any = self._session(self._options(hardware.cores))
        except Exception as error:  # its exceptions share no base class
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{path} cannot be loaded ({reason}); compile it again: bertforge compile") from error
        self.types = {value.name: value.type for value in self.session.get_inputs()}

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Backend`."""
        found: np.ndarray = self.session.run(["logits"], feeds(batch, self.types))[0]
        return found

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """See `base.Backend`. From a profile, which has each kernel with the types and shapes that came and went."""
        with TemporaryDirectory() as folder:
            options = self._options(1)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._session(options)
            session.run(["logits"], feeds(batch, self.types))
            events = json.loads(Path(session.end_profiling()).read_text())
        kernels = [event for event in events if event["args"].get("op_name") in _INT8 | _FLOAT]
        return [_product(event["name"], event["args"]) for event in kernels if "output_type_shape" in event["args"]]

    def _options(self, threads: int) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return options

    def _session(self, options: Any) -> Any:
        import onnxruntime as ort

        return ort.InferenceSession(str(self.path), options, providers=[self.provider])

    def close(self) -> None:
        """Drops the session."""
        self.session = None


def _product(name: str, kernel: dict[str, Any]) -> Product:
    """A kernel of a profile: `[{"float": [1, 128, 384]}, ...]` came in, likewise out."""
    (precision, left), (_, out) = (
        next(iter(kernel[key][0].items())) for key in ("input_type_shape", "output_type_shape")
    )
    precision = "int8" if kernel["op_name"] in _INT8 else _PRECISIONS.get(precision, precision)
    return Product(name.removesuffix("_kernel_time"), precision, math.prod(out) * left[-1], len(out) == 4)
