"""ONNX -> OpenVINO IR, in full precision or with linear layers in INT8 by NNCF.

Attention's own two products stay in bfloat16: in INT8 they are slower (the softmax between them is what costs; one
core of a Xeon with AMX: 138 questions/s without them, 134 with, 128 all in bfloat16; 2026-11-23) and they are what
loses accuracy first. The head stays too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    return out


def _quantized(
    model: Any,
    calibration: Sequence[Feeds],
    validation: Sequence[Feeds],
    accuracy: Callable[[np.ndarray], float] | None,
    max_drop: float,
) -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # NNCF would otherwise report its use over the network, unasked
    import nncf

    nncf.set_log_level(logging.ERROR)
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
    """Products of two activations (attention's own), and the head's."""
    products = [node for node in model.get_ops() if node.get_type_name() == "MatMul"]
    return [
        node.get_friendly_name()
        for node in products
        if node.get_friendly_name().startswith("head/")
        or all(value.get_node().get_type_name() != "Constant" for value in node.input_values())
    ]
