"""ONNX Runtime on a CPU or a CUDA device: one session, inputs by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bertforge.backends.base import BatchShape
from bertforge.backends.feeds import feeds
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import Hardware


class OnnxRuntimeBackend:
    """`model.onnx` in a session with every core's threads."""

    name = "onnxruntime"
    packed = False
    streams = 1

    def __init__(self, path: Path, hardware: Hardware, precision: str) -> None:
        """Raises MachineError without the library or the CUDA provider, ArtifactError for a damaged file."""
        try:
            import onnxruntime as ort
        except ImportError:
            raise MachineError("onnxruntime is not installed; pip install 'bertforge[onnxruntime]'") from None
        cuda = hardware.device.type == "cuda"
        provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        if provider not in ort.get_available_providers():
            raise MachineError("this onnxruntime has no CUDA provider; pip install onnxruntime-gpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = hardware.cores
        options.log_severity_level = 3
        self.shape = BatchShape(tokens=16_384, rows=32) if cuda else BatchShape(tokens=2048, multiple=8)
        self.device, self.precision = hardware.name, precision
        try:
            self.session: Any = ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # its exceptions share no base class
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{path} cannot be loaded ({reason}); compile it again: bertforge compile") from error
        self.types = {value.name: value.type for value in self.session.get_inputs()}

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Backend`."""
        found: np.ndarray = self.session.run(["logits"], feeds(batch, self.types))[0]
        return found

    def close(self) -> None:
        """Drops the session."""
        self.session = None
