"""ONNX -> OpenVINO IR, in full precision or with linear layers in INT8 by NNCF.

Attention's own two products stay in bfloat16: in INT8 they are slower (the softmax between them is what costs; one
core of a Xeon with AMX: 138 rows/s without them, 134 with, 128 all in bfloat16; 2026-11-23) and they are what
loses accuracy first. The head stays too.

Columns are raw numbers, which bfloat16 would round to three digits before they are scaled. So their nodes carry the
mark `precise`, which exempts them from the precision an engine is compiled for; Python has no call for it, hence the
edit of the file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from bertforge.artifact import write_atomic
from bertforge.export.graph import FULL_PRECISION

Feeds = dict[str, np.ndarray]
_RANKING_ROWS = 32


@dataclass(frozen=True)
class Calibration:
    """Rows for INT8: some to calibrate, others to judge by."""

    train: Sequence[Feeds]
    validation: Sequence[tuple[Feeds, int]]
    """With their labels."""
    max_drop: float
    """NNCF takes layers back to full precision until accuracy on the validation rows has fallen by this or less."""
    say: Callable[[str], object]


def convert(graph: Path, out: Path, calibration: Calibration | None = None) -> Path:
    """Writes `out` (.xml, with a .bin beside it); with `calibration`, in INT8."""
    import openvino

    model = openvino.Core().read_model(str(graph))
    if calibration:
        model = _quantized(model, calibration)
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


def _quantized(model: Any, calibration: Calibration) -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # NNCF would otherwise report its use over the network, unasked
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # not its handlers, which may be another's too

    def judge(compiled: Any, rows: Any) -> tuple[float, list[list[np.ndarray]]]:
        """Accuracy, and each row's logits, by which NNCF ranks layers."""
        request, kept = compiled.create_infer_request(), list(rows)
        logits = [request.infer(feeds)["logits"].copy() for feeds, _ in kept]
        right = sum(int(found.argmax() == label) for found, (_, label) in zip(logits, kept, strict=True))
        calibration.say(f"accuracy on {len(kept):,} validation rows: {right / len(kept):.2%}")
        return right / len(kept), [[found] for found in logits]

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(calibration.train),
        nncf.Dataset(calibration.validation, lambda row: row[0]),
        judge,
        max_drop=calibration.max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations: no zero points to correct for
        subset_size=len(calibration.train),
        # Where accuracy is lost, each quantized layer is judged on these rows: on all of them that takes minutes.
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
            ranking_subset_size=min(_RANKING_ROWS, len(calibration.validation))
        ),
        ignored_scope=nncf.IgnoredScope(names=_kept(model), validate=False),
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
