"""What an engine really does, read from TensorRT's list of its layers: precision of its products, fused attention.

The list (the builder's log, or the inspector's ONELINE format) has one line a layer: its name, its kind, its inputs and
constants with their types, and in its metadata the ONNX nodes it computes:

    Name: _gemm_mha_v2_myl0_7, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [16,64,32], ... Datatype: Half, ...
    }, ...], Outputs: [...], ..., Metadata: [ONNX Layer: layer0/MatMul_28][ONNX Layer: layer0/Softmax_26]...

Layers are listed in the order they run, the first profile first. The first layer that names a product computes it: a
later one that names it too applies its scale or bias, or belongs to another profile. What is told is therefore of the
first profile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# From narrow to wide; a product runs in the narrowest type it reads: what is wider is a mask, a residual or a scale.
_TYPES = (
    ("fp8", ("fp8", "e4m3")),
    ("int8", ("int8",)),
    ("fp16", ("half", "fp16")),
    ("bf16", ("bfloat16", "bf16")),
    ("fp32", ("float", "fp32")),
)
_TENSOR = re.compile(r"Dimensions: \[([-\d, ]*)\][^{}]*?Datatype: ([^,}\]]+)")


@dataclass(frozen=True)
class Layer:
    """One line of the list."""

    name: str
    types: frozenset[str]
    """Of the tensors it reads that have two axes or more: fp32, fp16, bf16, int8, fp8."""
    nodes: tuple[str, ...]
    """The ONNX nodes it names."""

    @property
    def precision(self) -> str:
        """The narrowest type it reads, or "unknown"."""
        return next((name for name, _ in _TYPES if name in self.types), "unknown")


def parse(listing: str) -> list[Layer]:
    """The layers of a list, in its order; lines of any other kind are passed over."""
    found = []
    for line in listing.splitlines():
        if (head := re.match(r"Name: (.*?), LayerType: ", line)) is None:
            continue
        reads = line[head.end() :].split("Outputs: [", 1)[0]
        types = {_type(kind) for dimensions, kind in _TENSOR.findall(reads) if "," in dimensions}
        nodes = tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: ([^\]]+)\]", line)))
        found.append(Layer(head.group(1), frozenset(types), nodes))
    return found


def summary(listing: str, work: dict[str, float]) -> dict[str, Any]:
    """Counts and shares for the receipt.

    `layers`; `gemm_share`, precision -> share of `work`, which is that of each product; `softmaxes`, and of them
    `fused_attention`: how many are computed by a layer that also computes a product. All empty or 0 when the list tells
    nothing.
    """
    layers = parse(listing)
    owner: dict[str, Layer] = {}
    for layer in layers:
        for node in layer.nodes:
            owner.setdefault(node, layer)
    products = [node for node in work if node in owner]
    total = sum(work[node] for node in products)
    share: dict[str, float] = {}
    for node in products:
        share[owner[node].precision] = share.get(owner[node].precision, 0.0) + work[node] / total
    computing = {owner[node].name for node in products}
    softmaxes = [owner[node].name for node in owner if "/Softmax_" in node]
    return {
        "layers": len(layers),
        "gemm_share": {name: round(value, 4) for name, value in sorted(share.items())},
        "softmaxes": len(softmaxes),
        "fused_attention": sum(name in computing for name in softmaxes),
    }


def product_work(graph: Path, rows: int, length: int) -> dict[str, float]:
    """Multiplications of each MatMul of an ONNX graph at one shape, by the name of its node."""
    import onnx

    model = onnx.load(str(graph))
    sizes = {"batch": rows, "seq": length}
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in sizes:
                axis.dim_value = sizes[axis.dim_param]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in inferred.value_info
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    return {
        node.name: float(np.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1])
        for node in inferred.node
        if node.op_type == "MatMul"
    }


def _type(said: str) -> str:
    low = said.lower()
    return next((name for name, words in _TYPES if any(word in low for word in words)), "other")
