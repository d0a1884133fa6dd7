"""What LitServe and Ray Serve serve: the same classifier, in an environment of theirs.

    python peer_classifier.py MODEL WORK        # WORK/calibration.json -> WORK/int8/model.xml

Both serve whatever function they are given. This one is what OpenVINO's documentation has of a Hugging Face classifier
on a CPU: `convert_model`, `nncf.quantize` on train rows to static INT8, and batches padded to their longest text. Of
the peers in `inference_cpu.py` the fastest is of this kind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAIT = 0.01  # seconds for a batch to fill
PADDED = {"padding": True, "truncation": True, "max_length": 512}
Classifier = Callable[[list[str]], list[list[float]]]


def quantize(model: Path, work: Path) -> None:
    """Writes the graph in INT8."""
    import nncf
    import openvino
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer = _tokenizer(model)
    network: Any = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    rows = json.loads((work / "calibration.json").read_text())
    graph = openvino.convert_model(network, example_input={**tokenizer(rows[:2], return_tensors="pt", **PADDED)})
    data = nncf.Dataset(rows, lambda text: {**tokenizer([text], return_tensors="np", **PADDED)})
    graph = nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    openvino.save_model(graph, work / "int8" / "model.xml")


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def classifier(model: Path, work: Path) -> Classifier:
    """Texts -> probabilities."""
    import numpy as np
    import openvino

    tokenizer = _tokenizer(model)
    compiled = openvino.Core().compile_model(work / "int8" / "model.xml", "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    names = {name for each in compiled.inputs for name in each.get_names()}

    def classify(texts: list[str]) -> list[list[float]]:
        arrays = tokenizer(texts, return_tensors="np", **PADDED)
        logits = compiled({name: array for name, array in arrays.items() if name in names})[0]
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        found: list[list[float]] = (chances / chances.sum(axis=1, keepdims=True)).tolist()
        return found

    return classify


if __name__ == "__main__":
    quantize(*map(Path, sys.argv[1:]))
