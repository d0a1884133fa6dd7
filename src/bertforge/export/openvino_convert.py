"""ONNX -> OpenVINO IR, in full precision or with linear layers in INT8 by NNCF.

Attention's own two products stay in bfloat16: in INT8 they are slower (the softmax between them is what costs; one
core of a Xeon with AMX: 138 questions/s without them, 134 with, 128 all in bfloat16; 2026-11-23) and they are what
loses accuracy first. The head stays too.

Columns are raw numbers, which bfloat16 would round to three digits before they are scaled. So their nodes carry the
mark `precise`, which exempts them from the precision an engine is compiled for; Python has no call for it, hence the
edit of the file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from bertforge.artifact import write_atomic
from bertforge.export.graph import FULL_PRECISION

Feeds = dict[str, np.ndarray]


def convert(
    graph: Path,
    out: Path,
    *,
    calibration: Sequence[Feeds] = (),
    validation: Sequence[Feeds] = (),
    accuracy: Callable[[np.ndarray], float] | None = None,
    max_drop: float = 0.003,
) -> Path:
    """Writes `out` (.xml, with a .bin beside it); with `calibration` rows, in INT8.

    With `validation` rows, `accuracy` judges their logits, and NNCF takes layers back to full precision until it has
    fallen by `max_drop` (a fraction) or less.
    """
    import openvino

    model = openvino.Core().read_model(str(graph))
    if calibration:
        model = _quantized(model, calibration, validation, accuracy, max_drop)
    openvino.save_model(model, str(out), compress_to_fp16=False)
    _mark_precise(out)
    return out


def _mark_precise(path: Path) -> None:
    """Marks every node of the columns in the IR at `path`."""
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name", "").startswith("columns/"):
            marks = layer.find("rt_info")
            marks = ElementTree.SubElement(layer, "rt_info") if marks is None else marks
            ElementTree.SubElement(marks, "attribute", name="precise", version="0")
    write_atomic(path, ElementTree.tostring(tree.getroot()))


def _quantized(
    model: Any,
    calibration: Sequence[Feeds],
    validation: Sequence[Feeds],
    accuracy: Callable[[np.ndarray], float] | None,
    max_drop: float,
) -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # NNCF would otherwise report its use over the network, unasked
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # not its handlers, which may be another's too
    common = {
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations: no zero points to correct for
        "subset_size": len(calibration),
        "ignored_scope": nncf.IgnoredScope(names=_kept(model), validate=False),
    }
    if accuracy is None:
        return nncf.quantize(model, nncf.Dataset(calibration), **common)

    def judge(compiled: Any, rows: Any) -> tuple[float, None]:
        request = compiled.create_infer_request()
        logits = np.concatenate([request.infer(row)["logits"] for row in rows])
        return accuracy(logits), None

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(calibration),
        nncf.Dataset(validation),
        judge,
        max_drop=max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        **common,
    )


def _kept(model: Any) -> list[str]:
    """What stands in a scope of full precision, and products of two activations: attention's own."""
    return [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_friendly_name().startswith(FULL_PRECISION)
        or (
            node.get_type_name() == "MatMul"
            and all(value.get_node().get_type_name() != "Constant" for value in node.input_values())
        )
    ]
