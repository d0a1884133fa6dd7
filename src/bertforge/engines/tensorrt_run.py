"""TensorRT and TensorRT-RTX on an NVIDIA GPU: one file, for the two libraries have one API.

Loading does everything that takes time. Each profile of the engine (a `Bucket`: rows x length) gets an execution
context, buffers for its named tensors, and one recorded CUDA graph: TensorRT asks for a context a graph, since a
graph holds its context's state and addresses. A call then copies ids in, replays, and copies logits out, all on one
stream of the engine's own. Nothing is built or compiled when a question comes.

TensorRT-RTX compiles kernels for the GPU at hand when a context first runs. They are kept in `runtime.cache` beside the
engine from the first loading on, and it records the CUDA graph itself, once those kernels stand.

Never run on a GPU so far: see docs/tensorrt.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, cuda

from bertforge.artifact import write_atomic
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.engines.base import BatchShape, feeds
from bertforge.engines.buckets import Bucket
from bertforge.engines.receipt import Product
from bertforge.engines.tensorrt_library import ENGINE, RUNTIME_CACHE, BuiltFor, load_library, new_log, sizes_of, unfit
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.hardware import Hardware
from bertforge.manifest import compile_command

if TYPE_CHECKING:
    import tensorrt

_TORCH = {"INT32": torch.int32, "INT64": torch.int64, "FLOAT": torch.float32, "HALF": torch.float16}


class TensorRtEngine:
    """`model.engine` with its `engine.json` beside it, loaded and warmed up."""

    packed = False
    streams = 1

    def __init__(self, target: str, folder: Path, precision: str, hardware: Hardware) -> None:
        """Raises MachineError without the library or a GPU it runs on, ArtifactError for an engine of another version
        or GPU and for a damaged file; the message holds the command that builds it anew."""
        if TYPE_CHECKING:
            trt = tensorrt
        else:
            trt = load_library(target)
        if reason := unfit(target, hardware):
            raise MachineError(f"{folder} cannot run here: {reason}")
        self.name, self.precision, self.device = target, precision, hardware.name
        again = compile_command(folder, target, precision)
        _check(folder, target, hardware, again)
        path = folder / ENGINE
        log = new_log(trt)
        self.runtime = trt.Runtime(log)
        engine = self.runtime.deserialize_cuda_engine(path.read_bytes()) if path.is_file() else None
        if engine is None:
            raise ArtifactError(f"{path} is missing or damaged ({log.reason}); build it again: {again}")
        self.engine = engine
        self.stream = cuda.Stream(hardware.device)  # type: ignore[no-untyped-call]
        jit = _Jit(engine, folder / RUNTIME_CACHE) if target == "tensorrt-rtx" else None
        self.profiles: dict[Bucket, _Profile] = {}
        for index in range(engine.num_optimization_profiles):
            context = jit.context() if jit else engine.create_execution_context()
            with cuda.stream(self.stream):  # buffers are cleared on the stream that will write them
                profile = _Profile(engine, index, context, self.stream)
            profile.record(by_library=jit is not None)
            self.profiles[profile.bucket] = profile
        if jit:
            jit.keep()
        edges = tuple(sorted({bucket.length for bucket in self.profiles}))
        most = max(bucket.rows * bucket.length for bucket in self.profiles)
        self.shape = BatchShape(tokens=most, edges=edges, filled=True)

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Engine`; raises UsageError for a row longer than the longest profile or of more values."""
        inputs = next(iter(self.profiles.values())).inputs
        arrays = feeds(batch, inputs)
        rows, width = arrays["input_ids"].shape
        if width > self.shape.edges[-1]:
            raise UsageError(
                f"a text of {width} tokens is longer than the engine's longest profile, {self.shape.edges[-1]} tokens; "
                "cut it, or compile a model that was trained with a larger max_length"
            )
        for name in (batch.tabular or {}).keys() & inputs.keys():
            if (given := arrays[name].shape[1]) > (most := inputs[name].device.shape[1]):
                raise UsageError(
                    f"a row has {given} values under {name!r} and the engine takes {most}; "
                    "predict the table with the model it was compiled from"
                )
        length = self.shape.padded(width)
        fitting = sorted((bucket for bucket in self.profiles if bucket.length == length), key=lambda b: b.rows)
        parts, start = [], 0
        while start < rows:
            bucket = next((bucket for bucket in fitting if bucket.rows >= rows - start), fitting[-1])
            part = {name: array[start : start + bucket.rows] for name, array in arrays.items()}
            parts.append(self.profiles[bucket].run(part))
            start += bucket.rows
        return np.concatenate(parts)

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """None: what its layers run in was read when it was built, see `tensorrt_layers`."""
        return []

    def close(self) -> None:
        """Drops graphs and contexts before the engine they came from."""
        self.profiles = {}
        del self.engine, self.runtime


@dataclass
class _Buffer:
    """A named tensor: where the engine reads or writes it, and the host memory it is filled from."""

    device: Tensor
    host: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Buffer:
        pinned = device.type == "cuda"
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, pin_memory=pinned))

    def fill(self, array: np.ndarray) -> None:
        """Copies `array` into the corner; what is around it is 0: padding, no value of a column, an empty row."""
        self.host.zero_()
        self.host[tuple(slice(size) for size in array.shape)] = torch.from_numpy(array)
        self.device.copy_(self.host, non_blocking=True)


class _Profile:
    """One profile of the engine, at the one shape it was built for."""

    def __init__(
        self, engine: tensorrt.ICudaEngine, index: int, context: tensorrt.IExecutionContext, stream: cuda.Stream
    ) -> None:
        self.context, self.stream = context, stream
        _must(context.set_optimization_profile_async(index, stream.cuda_stream), f"choose profile {index}")
        self.inputs: dict[str, _Buffer] = {}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for name in names:
            if engine.get_tensor_mode(name).name == "INPUT":
                shape = sizes_of(engine.get_tensor_profile_shape(name, index)[2])  # smallest, usual, largest: all one
                self.inputs[name] = _Buffer.of(shape, _TORCH[engine.get_tensor_dtype(name).name], stream.device)
                _must(context.set_input_shape(name, shape), f"take {name} of shape {shape}")
                _must(context.set_tensor_address(name, self.inputs[name].device.data_ptr()), f"read {name}")
        self.logits = torch.zeros(sizes_of(context.get_tensor_shape("logits")), device=stream.device)
        _must(context.set_tensor_address("logits", self.logits.data_ptr()), "write logits")
        self.bucket = Bucket(*self.inputs["input_ids"].device.shape)
        self.launch: Callable[[], None] = self.execute

    def execute(self) -> None:
        """Queues the engine's kernels, or the library's own recording of them."""
        _must(self.context.execute_async_v3(self.stream.cuda_stream), f"run {self.bucket}")

    def record(self, *, by_library: bool) -> None:
        """Runs once, so that what is set up at a first run does not end in the graph, then records `launch`."""
        with cuda.stream(self.stream):
            self.execute()
        self.stream.synchronize()
        if by_library:
            return
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=self.stream):
            self.execute()
        self.launch = graph.replay

    def run(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Logits `[rows, labels]` of inputs with as many rows as the bucket or fewer."""
        rows = len(arrays["input_ids"])
        with cuda.stream(self.stream):
            for name, buffer in self.inputs.items():
                buffer.fill(arrays[name])
            self.launch()
            found: np.ndarray = self.logits[:rows].to("cpu", copy=True).numpy()  # waits for the stream
        return found


class _Jit:
    """How TensorRT-RTX compiles for this GPU: at once, remembering its kernels, recording its own CUDA graphs."""

    def __init__(self, engine: Any, cache: Path) -> None:
        import tensorrt_rtx as rtx

        self.engine, self.path = engine, cache
        self.config = engine.create_runtime_config()
        self.config.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.config.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        self.cache = self.config.create_runtime_cache()
        if cache.is_file():
            self.cache.deserialize(cache.read_bytes())  # false for another GPU or driver: then it starts empty
        self.config.set_runtime_cache(self.cache)

    def context(self) -> Any:
        return self.engine.create_execution_context(self.config)

    def keep(self) -> None:
        """Writes the kernels beside the engine the first time; a later loading only reads them."""
        if not self.path.exists():
            write_atomic(self.path, bytes(self.cache.serialize()))


def _check(folder: Path, target: str, hardware: Hardware, again: str) -> None:
    """Raises ArtifactError when the engine was built by another version or for another GPU than are here."""
    built = BuiltFor.read(folder)
    here = BuiltFor.here(target, hardware, built.graph, built.shapes)
    if built.version != here.version:
        raise ArtifactError(
            f"{folder} was built by {target} {built.version}, and {here.version} is installed; build it again: {again}"
        )
    if built.gpu != here.gpu:
        raise ArtifactError(f"{folder} was built for {built.gpu}, and this is {here.gpu}; build it again: {again}")


def _must(done: bool, what: str) -> None:
    if not done:
        raise ArtifactError(
            f"TensorRT would not {what}; the engine is damaged or the GPU out of memory: compile it again"
        )
