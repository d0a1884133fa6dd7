"""A thin writer of ONNX graphs: nodes are added one by one, constants are named, everything else is onnx.helper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20  # the first with Gelu
IR_VERSION = 10
TYPES: dict[str, Any] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
# Scopes whose nodes stay in float32: nothing that quantizes a graph may touch them.
FULL_PRECISION = ("columns/", "head/")


class Graph:
    """Nodes, constants, inputs and outputs of a graph under construction. A value is known by its name, a string."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.scope = ""

    def input(self, name: str, dtype: Any, shape: Sequence[str | int]) -> str:
        """Declares an input; strings in `shape` are dynamic axes."""
        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """A named constant; the same name means the same value."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def ints(self, *values: int) -> str:
        """A constant `[len(values)]` int64, as axes and shapes are given."""
        return self.constant("ints_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        output = f"{self.scope}{name or op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def cast(self, value: str, dtype: np.dtype[Any]) -> str:
        """`value` in another type."""
        return self.add("Cast", value, to=helper.np_dtype_to_tensor_dtype(dtype))

    def dense(self, value: str, name: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """A linear layer in the types of its weight `[out, in]` and bias: `[..., in]` -> `[..., out]`."""
        product = self.add("MatMul", value, self.constant(f"{name}.weight", weight.T))
        return self.add("Add", product, self.constant(f"{name}.bias", bias))

    def finish(self, output: str, name: str, shape: Sequence[str | int], metadata: dict[str, str]) -> onnx.ModelProto:
        """The checked model, with `output` (float32) under `name`."""
        self.nodes.append(helper.make_node("Identity", [output], [name], name=name))
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "bertforge", self.inputs, [result], list(self.constants.values()))
        domains = {"": OPSET} | {node.domain: 1 for node in self.nodes if node.domain}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="bertforge")
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model


def products_of(model: onnx.ModelProto, linears: Sequence[str]) -> list[str]:
    """The nodes that multiply with the weights of `linears`, which `Graph.dense` and `bert_onnx` name after them."""
    weights = {f"{name}.weight" for name in linears}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def input_names(path: Path) -> list[str]:
    """Of the graph in a file."""
    return [value.name for value in onnx.load(str(path), load_external_data=False).graph.input]
