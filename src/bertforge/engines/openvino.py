"""OpenVINO on a CPU: one stream a core, each with a request of its own; for a question that comes alone, every core.

Alone is a row that comes while no other call is running.

Measured on a 2-core Xeon with AMX (2026-11-23, all-MiniLM-L6-v2, 240 questions of real lengths, one core, bfloat16):
batches of one row 92 rows/s, of one row with lengths rounded to 16 tokens 106, of 2,048 tokens 128, of 4,096
tokens 111. A new shape costs some milliseconds of kernel generation, which rounding saves; beyond 2,048 tokens the
activations leave the cache. A single row waits 5.2 ms in INT8 where both cores work on it, 9.0 ms on one core's stream
(medians of 60 rows); batches gain nothing from it: 1.2 times slower.

INT8 stands in the graph as pairs of QuantizeLinear and DequantizeLinear, which OpenVINO turns into 8-bit products. Its
own quantizer, NNCF, gives engines of the same speed and error, takes ten times as long, and inserts corrections that no
simulation knows (docs/engineering-log.md, 2026-11-26).

Columns are raw numbers, which bfloat16 would round to three digits before they are scaled. So their nodes carry the
mark `precise`, which exempts them from the precision an engine is compiled for; Python has no call for it, hence the
edit of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any
from xml.etree import ElementTree

import numpy as np

from bertforge import quiet
from bertforge.artifact import write_atomic
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.streaming import in_a_thread
from bertforge.engines.base import BatchShape, Order, Target, TritonBackend, feeds
from bertforge.engines.receipt import Product
from bertforge.errors import ArtifactError
from bertforge.hardware import Hardware
from bertforge.model.points import PRODUCTS

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # int8 stands in the graph; the hint is for what is left

_FILE = "model.xml"
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}


def build(folder: Path, order: Order, hardware: Hardware) -> dict[str, Any]:
    """Writes `model.xml` and `model.bin`; its receipt has nothing of its own."""
    openvino = quiet.load("openvino")

    from bertforge.export.bert_onnx import export_onnx

    order.say("writing the ONNX graph")
    # In float32 whatever is wanted: OpenVINO lowers it when it loads it.
    graph = export_onnx(order.model, folder / "graph.onnx", scales=order.scales)
    model = openvino.Core().read_model(str(graph))
    try:
        openvino.save_model(model, str(folder / _FILE), compress_to_fp16=False)
    except RuntimeError as error:  # it says no more than "iostream error"
        raise ArtifactError(f"{folder / _FILE} cannot be written ({error}); look whether the disk is full") from error
    _mark_precise(folder / _FILE)
    graph.unlink()
    return {}


def _mark_precise(path: Path) -> None:
    """Marks every node of the columns in the IR at `path`."""
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name", "").startswith("columns/"):
            marks = layer.find("rt_info")
            marks = ElementTree.SubElement(layer, "rt_info") if marks is None else marks
            ElementTree.SubElement(marks, "attribute", name="precise", version="0")
    write_atomic(path, ElementTree.tostring(tree.getroot()))


class OpenVinoEngine:
    """`model.xml`, compiled for this CPU when it is loaded."""

    name = "openvino"
    packed = False
    shape = BatchShape(tokens=2048, multiple=16)

    def __init__(self, folder: Path, precision: str, hardware: Hardware, *, exact: bool = False) -> None:
        """`exact` rounds nothing on the way: see `Target.exact`. Raises ArtifactError for a damaged file."""
        openvino = quiet.load("openvino")

        path = folder / _FILE
        self.streams = hardware.cores
        self.device, self.precision = hardware.name, precision
        hint = HINTS[precision] if hardware.bf16 and not exact else "f32"
        settings = {"INFERENCE_NUM_THREADS": hardware.cores, "INFERENCE_PRECISION_HINT": hint}
        if exact:  # activations that meet 8-bit weights would be quantized as they come
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0

        def compiled(streams: int) -> Any:
            core = openvino.Core()
            model = core.read_model(str(path))
            if exact:
                _unround_pairs(model)
            return core.compile_model(model, "CPU", {"NUM_STREAMS": streams, **settings})

        try:
            many = in_a_thread(lambda: compiled(self.streams))
            self.single = in_a_thread(lambda: compiled(1)) if self.streams > 1 else many
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArtifactError(f"{path} cannot be loaded ({reason}); compile it again: bertforge compile") from error
        self.names = {name for value in many.inputs for name in value.get_names()}
        self.requests, self.alone = _requests(many, self.streams), _requests(self.single, 1)
        self.running, self.lock = 0, Lock()
        # OpenVINO's binding looks NumPy up when a tensor's data is first asked for, and two threads that do so at once
        # may wait for each other for ever (2026.4): one for the interpreter, one for the lookup. So it is asked here.
        with self._request(1) as request:
            assert request.get_input_tensor(0).data is not None

    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Engine`."""
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
        """See `base.Engine`. Of the model with one stream, for each stream has a graph of its own."""
        self.single.create_infer_request().infer(feeds(batch, self.names))
        tokens = int(batch.input_ids.shape[-1])
        found = (_product(node, tokens) for node in self.single.get_runtime_model().get_ordered_ops())
        return [product for product in found if product is not None]

    def close(self) -> None:
        """Drops the requests, and the compiled models with them."""
        self.single, self.requests, self.alone = None, SimpleQueue(), SimpleQueue()


def _unround_pairs(model: Any) -> None:
    """Every pair of an activation clamps and scales as it did, and rounds no more; operands of attention's own products
    pass as they are, for the model beside it has no place where it could clamp them.

    In the IR a pair is FakeQuantize, from the values' range to that of the integers, some conversions, Subtract of the
    zero point and Multiply with the scale; weights have no FakeQuantize.
    """
    ops = quiet.load("openvino.opset13")

    for node in model.get_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        low, high, first, last = (np.asarray(node.input_value(i).get_node().data, np.float32) for i in range(1, 5))
        value = ops.clamp(node.input_value(0), float(low.min()), float(high.max()))
        value = ops.multiply(ops.subtract(value, ops.constant(low)), ops.constant((last - first) / (high - low)))
        value = ops.add(value, ops.constant(first))
        step = node
        while step.get_type_name() != "Multiply":
            (reader,) = step.output(0).get_target_inputs()
            step = reader.get_node()
            if step.get_type_name() == "Subtract":
                zero = step.input_value(1).get_node()
                zero = zero if zero.get_type_name() == "Constant" else zero.input_value(0).get_node()
                value = ops.subtract(value, ops.constant(np.asarray(zero.data, np.float32)))
        scale = step.input_value(1)
        if scale.get_node().get_friendly_name().removesuffix(".scale").endswith(PRODUCTS):
            step.output(0).replace(node.input_value(0))
        else:
            step.output(0).replace(ops.multiply(value, scale).output(0))


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


def _unfit(hardware: Hardware) -> str | None:
    if hardware.device.type == "cpu":
        return None
    return (
        f"it runs on a CPU, and the device here is {hardware.name}; take another target, "
        "or hide the GPU: CUDA_VISIBLE_DEVICES=-1 bertforge ..."
    )


TARGET = Target(
    name="openvino",
    precisions=("fp32", "bf16", "int8"),
    libraries=("onnx", "openvino"),
    extra="openvino",
    about="engines for CPUs",
    build=build,
    open=OpenVinoEngine,
    exact=partial(OpenVinoEngine, exact=True),
    rest=lambda hardware: "bf16" if hardware.bf16 else "fp32",
    only={"cuda": ()},
    unfit=_unfit,
    # Of a batch of several requests Triton's backend would fix the size. It takes bfloat16 wherever the CPU has it, so
    # an engine in float32 would not stay one.
    triton=TritonBackend("openvino", (_FILE, "model.bin"), ("bf16", "int8"), batches=False, streams="NUM_STREAMS"),
)
