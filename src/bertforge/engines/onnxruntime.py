"""ONNX Runtime on a CPU or a CUDA device: one session, inputs by name.

INT8 of a plain model is ONNX Runtime's own way on a CPU: weights in 8 bits with one scale a channel, activations
quantized as they come, with one scale a batch.

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

from bertforge import quiet
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.engines.base import BatchShape, Order, Target, TritonBackend, feeds
from bertforge.engines.receipt import Product
from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import Hardware
from bertforge.model.points import PRODUCTS

_CUDA = "CUDAExecutionProvider"
_INT8 = {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
_FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
_ATTENTION = "MultiHeadAttention"
_PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}


_FILE = "model.onnx"


def build(folder: Path, order: Order, hardware: Hardware) -> dict[str, Any]:
    """Writes `model.onnx`; its receipt has nothing of its own."""
    from bertforge.export.bert_onnx import export_onnx

    order.say("writing the ONNX graph")
    half = order.precision == "fp16"  # on CUDA, where attention has a kernel as one node
    graph = export_onnx(
        order.model, folder / _FILE, precision="fp16" if half else "fp32", scales=order.scales, fused=half
    )
    if order.precision == "int8" and order.scales is None:
        order.say("quantizing the weights")
        _quantize(graph, order.spared)
    return {}


def _quantize(path: Path, spared: tuple[str, ...]) -> None:
    """Rewrites the graph at `path`: linear layers of the encoder in INT8, but for those `spared`; head and columns as
    they were."""
    import onnx

    from bertforge.export.graph import FULL_PRECISION, products_of

    quantization = quiet.load("onnxruntime.quantization")

    model = onnx.load(str(path))
    kept = [node.name for node in model.graph.node if node.name.startswith(FULL_PRECISION)]
    # What its advice to pre-process a graph first looks for; ours needs none.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    quantization.quantize_dynamic(
        model,
        str(path),
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=False,
        op_types_to_quantize=["MatMul"],  # by default it would round the embeddings too, which gains no time
        nodes_to_exclude=kept + products_of(model, spared),
    )


class OnnxRuntimeEngine:
    """`model.onnx` in a session with every core's threads, or on the GPU."""

    name = "onnxruntime"
    packed = False
    streams = 1

    def __init__(self, folder: Path, precision: str, hardware: Hardware, *, exact: bool = False) -> None:
        """`exact` rounds nothing on the way: see `Target.exact`.

        Raises MachineError without the CUDA provider, ArtifactError for a damaged file.
        """
        ort = quiet.load("onnxruntime")
        path = folder / _FILE
        self.device, self.precision = hardware.name, precision
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
        self.source: str | bytes = _without_rounding(path) if exact else str(path)
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
        """See `base.Engine`."""
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
        """See `base.Engine`. From a profile, which has each kernel with the types and shapes that came and went."""
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
        options = quiet.load("onnxruntime").SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return options

    def _session(self, options: Any) -> Any:
        return quiet.load("onnxruntime").InferenceSession(self.source, options, providers=[self.provider])

    def close(self) -> None:
        """Drops the session."""
        self.session = None


def _without_rounding(path: Path) -> bytes:
    """The graph at `path` with its weights as they are and nothing rounded on the way.

    A pair of QuantizeLinear and DequantizeLinear clamps and scales as it did; operands of attention's own products pass
    as they are, for the model beside it has no place where it could clamp them. Where activations are quantized as they
    come, which clamps nothing, a product of two integers becomes one of the float activation and the stored weight, and
    the activation's scale becomes 1. Raises ArtifactError for a graph that has other nodes of 8 bits.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    nodes: list[Any] = []

    def constant(name: str, value: np.ndarray) -> str:
        if name not in constants:
            constants[name] = value
            graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def floats(name: str) -> str:
        return constant(f"{name}_float", constants[name])

    def add(kind: str, output: str, *inputs: str) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [output], name=output))
        return output

    for node in graph.node:
        kind, output = node.op_type, node.output[0]
        given, *others = [str(name) for name in node.input] or [""]
        source = made.get(given)
        if kind == "QuantizeLinear":
            steps = add("Add", f"{output}_steps", add("Div", f"{output}_scaled", given, others[0]), floats(others[1]))
            add("Clip", output, steps, constant("least", np.array(-128)), constant("most", np.array(127)))
        elif kind == "DequantizeLinear" and others[0].removesuffix(".scale").endswith(PRODUCTS):
            assert source is not None
            add("Identity", output, source.input[0])
        elif kind == "DequantizeLinear" and source is not None:
            add("Mul", output, add("Sub", f"{output}_centered", given, floats(others[1])), others[0])
        elif kind == "DequantizeLinear":  # of a weight [in, out]; left to itself, it may meet integers again
            weight, scale, zero = (constants[name].astype(np.float32) for name in node.input)
            constant(output, (weight - zero) * scale)
        elif kind == "DynamicQuantizeLinear":
            constant(node.output[1], np.ones(()))
        elif kind == "MatMulInteger":
            if source is None or source.op_type != "DynamicQuantizeLinear":
                raise ArtifactError(f"{path} holds a product of 8 bits that bertforge does not know; compile it again")
            weight, zero = (constants[name].astype(np.float32) for name in node.input[1::2])
            add("MatMul", output, source.input[0], constant(f"{output}_weight", weight - zero))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    found: bytes = model.SerializeToString()
    return found


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


def _exact(folder: Path, precision: str, hardware: Hardware) -> OnnxRuntimeEngine | None:
    """None in fp16, which stands in the graph."""
    return None if precision == "fp16" else OnnxRuntimeEngine(folder, precision, hardware, exact=True)


TARGET = Target(
    name="onnxruntime",
    precisions=("fp32", "fp16", "int8"),
    libraries=("onnx", "onnxruntime"),
    extra="onnxruntime",
    about="engines for CPUs, and for GPUs in fp32 and fp16",
    build=build,
    open=OnnxRuntimeEngine,
    exact=_exact,
    rest=lambda hardware: "fp32",
    dynamic=True,
    # Its float16 is emulated on a CPU; its int8 products are a CPU's, and on a GPU many times slower than float32.
    only={"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")},
    triton=TritonBackend("onnxruntime", (_FILE,), ("fp32", "fp16", "int8"), batches=True),
)
