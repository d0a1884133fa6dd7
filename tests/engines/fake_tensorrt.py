"""A TensorRT that runs on a CPU: the calls of the real one, recorded, and ONNX Runtime for the arithmetic.

It is as strict as the real one where order matters: a context has a profile before shapes, shapes before addresses,
runs once before it is captured, and a capture runs nothing until it is replayed. It reads and writes memory at the
addresses it is given.
"""

import contextlib
import ctypes
import importlib.machinery
import sys
import types
from enum import Enum

import numpy as np
import onnxruntime as ort
import torch

from bertforge.engines.tensorrt_build import VALUES
from bertforge.hardware import Hardware

GPU = Hardware(torch.device("cpu"), "Fake RTX 4090", 24.0, cores=2, bf16=True, capability=(8, 9))
MAGIC = b"fake engine"
DataType = Enum("DataType", "INT32 INT64 FLOAT")
TYPES = {  # ONNX Runtime's name -> TensorRT's and C's
    "tensor(int32)": (DataType.INT32, ctypes.c_int32),
    "tensor(int64)": (DataType.INT64, ctypes.c_int64),
    "tensor(float)": (DataType.FLOAT, ctypes.c_float),
}
TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")


class FakeCuda:
    """What the engine uses of `torch.cuda`."""

    def __init__(self):
        self.capturing = None
        self.events = []

    def Stream(self, device):  # noqa: N802  # torch's name
        return types.SimpleNamespace(
            cuda_stream=7, device=device, synchronize=lambda: self.events.append("synchronize")
        )

    def stream(self, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):  # noqa: N802
        calls = []

        def replay():
            self.events.append("replay")
            for call in calls:
                call()

        return types.SimpleNamespace(calls=calls, replay=replay)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = graph
        self.events.append("capture")
        yield
        self.capturing = None


class FakeContext:
    def __init__(self, engine, cuda, config):
        self.engine, self.cuda, self.config = engine, cuda, config
        self.profile, self.shapes, self.addresses, self.runs = None, {}, {}, 0

    def set_optimization_profile_async(self, index, stream):
        assert stream == 7
        self.profile = index
        return 0 <= index < len(self.engine.shapes)

    def set_input_shape(self, name, shape):
        assert self.profile is not None, "a profile comes first"
        self.shapes[name] = shape
        return tuple(shape) == self.engine.input_shape(name, self.profile)

    def get_tensor_shape(self, name):
        assert name == "logits"
        assert self.shapes.keys() == self.engine.inputs.keys()
        return (self.shapes["input_ids"][0], self.engine.labels)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == 7
        assert self.addresses.keys() == {*self.engine.inputs, "logits"}
        if self.cuda.capturing is not None:
            assert self.runs, "a context runs once before it is captured"
            self.cuda.capturing.calls.append(self.compute)
            return True
        self.cuda.events.append(("execute", self.profile))
        self.compute()
        return True

    def compute(self):
        self.runs += 1
        feeds = {
            name: self.memory(name, TYPES[self.engine.inputs[name].type][1], shape).copy()
            for name, shape in self.shapes.items()
        }
        found = self.engine.session.run(["logits"], feeds)[0]
        self.memory("logits", ctypes.c_float, self.get_tensor_shape("logits"))[:] = found

    def memory(self, name, kind, shape):
        return np.ctypeslib.as_array((kind * int(np.prod(shape))).from_address(self.addresses[name])).reshape(shape)


class FakeEngine:
    """`shapes`: rows and tokens of each profile; `graph`: the ONNX file it computes."""

    def __init__(self, shapes, graph, cuda):
        self.shapes, self.cuda = shapes, cuda
        self.num_optimization_profiles = len(shapes)
        self.session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.labels = self.session.get_outputs()[0].shape[1]
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.num_io_tensors = len(self.inputs) + 1
        self.contexts = []

    def input_shape(self, name, profile):
        named = dict(zip(("batch", "seq", "values"), (*self.shapes[profile], VALUES), strict=True))
        return tuple(named.get(size, size) for size in self.inputs[name].shape)

    def get_tensor_name(self, index):
        return [*self.inputs, "logits"][index]

    def get_tensor_mode(self, name):
        return TensorIOMode.OUTPUT if name == "logits" else TensorIOMode.INPUT

    def get_tensor_dtype(self, name):
        return DataType.FLOAT if name == "logits" else TYPES[self.inputs[name].type][0]

    def get_tensor_profile_shape(self, name, index):
        return [self.input_shape(name, index)] * 3

    def create_runtime_config(self):
        cache = types.SimpleNamespace(deserialize=self.cuda.events.append, serialize=lambda: b"compiled kernels")
        return types.SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda cache: True)

    def create_execution_context(self, config=None):
        self.contexts.append(FakeContext(self, self.cuda, config))
        return self.contexts[-1]


def install(monkeypatch, name, graph, shapes, version="1.7.1"):
    """Makes `import NAME` give a fake whose engines compute `graph`; returns the FakeCuda that saw it all."""
    from bertforge.engines import tensorrt_run as engine

    cuda = FakeCuda()

    class Logger:
        INTERNAL_ERROR, ERROR = "internal", "error"

    class Runtime:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, data):
            if data != MAGIC:
                self.log.log(Logger.ERROR, "Magic tag does not match\nand more")
                return None
            cuda.engine = FakeEngine(shapes, graph, cuda)
            return cuda.engine

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__version__, module.ILogger, module.Runtime = version, Logger, Runtime
    module.CudaGraphStrategy = Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
    module.DynamicShapesKernelSpecializationStrategy = Enum("Strategy", "LAZY EAGER NONE")
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engine, "cuda", cuda)
    return cuda
