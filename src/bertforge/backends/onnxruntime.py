"""ONNX Runtime on a CPU or a CUDA device: one session, inputs by name.

On CUDA inputs and outputs are torch tensors bound by address, and the session works on a stream of torch's: nothing is
copied or waited for behind our back, and a caching allocator serves both.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bertforge.backends.base import BatchShape
from bertforge.backends.feeds import feeds
from bertforge.backends.receipt import Product
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import Hardware

_CUDA = "CUDAExecutionProvider"
_INT8 = {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
_FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
_ATTENTION = "MultiHeadAttention"
_PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class OnnxRuntimeBackend:
    """`model.onnx` in a session with every core's threads, or on the GPU."""

    name = "onnxruntime"
    packed = False
    streams = 1

    def __init__(self, path: Path, hardware: Hardware, precision: str) -> None:
        """Raises MachineError without the CUDA provider, ArtifactError for a damaged file."""
        import onnxruntime as ort

        self.path, self.device, self.precision = path, hardware.name, precision
        self.stream: torch.cuda.Stream | None = None
        self.provider: Any = "CPUExecutionProvider"
        self.shape = BatchShape(tokens=2048, multiple=8)
        if hardware.device.type == "cuda":
            ort.preload_dlls()  # CUDA's and cuDNN's libraries, where torch's packages have them
            if _CUDA not in ort.get_available_providers():
                raise MachineError("this onnxruntime has no CUDA provider; pip install onnxruntime-gpu")
            self.stream = torch.cuda.Stream(hardware.device)  # type: ignore[no-untyped-call]
            self.provider = (_CUDA, _cuda_options(self.stream))
            self.shape = BatchShape(tokens=16_384, multiple=8)
        try:
            self.session: Any = self._session(self._options(hardware.cores))
        except Exception as error:  # its exceptions share no base class
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{path} cannot be loaded ({reason}); compile it again: bertforge compile") from error
        if self.stream and self.session.get_providers()[0] != _CUDA:
            raise MachineError("onnxruntime cannot load its CUDA provider; pip install 'onnxruntime-gpu[cuda,cudnn]'")
        self.types = {value.name: value.type for value in self.session.get_inputs()}
        self.labels = int(self.session.get_outputs()[0].shape[1])

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Backend`."""
        arrays = feeds(batch, self.types)
        if self.stream:
            with torch.cuda.stream(self.stream):
                inputs = {name: torch.from_numpy(array).to(self.stream.device) for name, array in arrays.items()}
                return self.bound(inputs).cpu().numpy()
        found: np.ndarray = self.session.run(["logits"], arrays)[0]
        return found

    def bound(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits `[rows, labels]` on the device of `inputs`, which are read where they lie."""
        logits = torch.empty(len(inputs["input_ids"]), self.labels, device=inputs["input_ids"].device)
        binding = self.session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, {"logits": logits})):
            for name, tensor in tensors.items():
                dtype = getattr(np, str(tensor.dtype).removeprefix("torch."))
                bind(name, tensor.device.type, tensor.device.index or 0, dtype, tensor.shape, tensor.data_ptr())
        self.session.run_with_iobinding(binding)
        return logits

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """See `base.Backend`. From a profile, which has each kernel with the types and shapes that came and went."""
        with TemporaryDirectory() as folder:
            options = self._options(1)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._session(options)
            session.run(["logits"], feeds(batch, self.types))
            events = json.loads(Path(session.end_profiling()).read_text())
        kernels = [event for event in events if event["args"].get("op_name") in _INT8 | _FLOAT | {_ATTENTION}]
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


def _cuda_options(stream: torch.cuda.Stream) -> dict[str, str]:
    return {
        "device_id": str(stream.device.index),
        "user_compute_stream": str(stream.cuda_stream),
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it takes
        "use_tf32": "0",  # fp32 means fp32
    }


def _product(name: str, kernel: dict[str, Any]) -> Product:
    """A kernel of a profile: `[{"float": [1, 128, 384]}, ...]` came in, likewise out."""
    reads = [next(iter(value.items())) for value in kernel["input_type_shape"]]
    (precision, left), out = reads[0], next(iter(kernel["output_type_shape"][0].values()))
    name, precision = name.removesuffix("_kernel_time"), _PRECISIONS.get(precision, precision)
    if kernel["op_name"] == _ATTENTION:  # of queries and keys [batch, length, hidden]; two products
        keys = reads[1][1][1]
        return Product(name, precision, 2 * math.prod(out) * keys, attention=True, fused=True)
    precision = "int8" if kernel["op_name"] in _INT8 else precision
    return Product(name, precision, math.prod(out) * left[-1], len(out) == 4)
