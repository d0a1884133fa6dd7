"""Logits -> calibrated probabilities and the label: the last model of the ensemble, copied there as `model.py`.

It is apart from the engine so that Triton runs the very file that was proved. NumPy is all it needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def decide(
    logits: np.ndarray, temperature: float, shifts: Sequence[float], labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[rows, labels]` -> the labels `[rows]` as UTF-8, and `[rows, labels]` float32 of probabilities.

    `shifts` `[labels]` correct for the prior that the folder's thresholds were chosen for; 0 where there is none.
    """
    scaled = logits / np.float32(temperature) + np.array(shifts, np.float32)
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    return np.array([labels[place].encode() for place in probabilities.argmax(axis=1)], object), probabilities


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Standard."""
        path = Path(args["model_repository"], args["model_version"], "settings.json")
        self.settings: dict[str, Any] = json.loads(path.read_text())

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Standard."""
        import triton_python_backend_utils as triton

        responses = []
        for request in requests:
            logits = triton.get_input_tensor_by_name(request, "logits").as_numpy()
            label, probabilities = decide(logits, **self.settings)
            tensors = [triton.Tensor("label", label), triton.Tensor("probabilities", probabilities)]
            responses.append(triton.InferenceResponse(tensors))
        return responses
