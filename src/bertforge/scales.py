"""What quantization learnt, apart from any library: the range of every quantized value, in one safetensors file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from bertforge.artifact import write_atomic
from bertforge.errors import ArtifactError

SCALES = "scales.safetensors"
FORMATS = {"int8": 127.0, "fp8": 448.0}
"""Format -> its largest number: symmetric 8-bit integers; E4M3 (Micikevicius et al. 2022, arXiv 2209.05433)."""


@dataclass(frozen=True)
class Scales:
    """For each quantized point the largest value that is represented."""

    format: str
    """int8 or fp8."""
    activations: dict[str, float]
    """Point, such as `bert.encoder.layer.0.intermediate.dense` (its input) or `...attention.self.shares` -> amax."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    """Linear layer -> amax of each output channel, [out] float32; where absent, the weight's own."""
    smooth: dict[str, np.ndarray] = field(default_factory=dict)
    """Linear layer -> what each input channel is multiplied with before quantization, [in] float32; the weight is
    divided by it (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438, equation 3)."""

    @property
    def largest(self) -> float:
        """The largest number of the format."""
        return FORMATS[self.format]

    def without(self, points: Collection[str]) -> Self:
        """A copy in which `points` are not quantized."""
        kept = {name: value for name, value in self.activations.items() if name not in points}
        return replace(self, activations=kept)

    def save(self, folder: Path) -> Path:
        """Writes `scales.safetensors` into `folder`."""
        arrays: dict[str, np.ndarray] = {
            f"activations/{name}": np.array(value, np.float32) for name, value in self.activations.items()
        }
        arrays |= {f"weights/{name}": array for name, array in self.weights.items()}
        arrays |= {f"smooth/{name}": array for name, array in self.smooth.items()}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return write_atomic(folder / SCALES, to_bytes(contiguous, metadata={"format": self.format}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `scales.safetensors`; raises ArtifactError when it is missing or damaged."""
        path = folder / SCALES
        parts: dict[str, dict[str, np.ndarray]] = {"activations": {}, "weights": {}, "smooth": {}}
        try:
            with safe_open(path, framework="np") as file:
                form = file.metadata()["format"]
                for name in file.keys():  # noqa: SIM118  # not a dict
                    part, _, point = name.partition("/")
                    parts[part][point] = file.get_tensor(name)
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is missing or damaged ({str(error)[:120]}); make the folder again: bertforge quantize"
            ) from error
        activations = {point: float(value.item()) for point, value in parts["activations"].items()}
        return cls(form, activations, parts["weights"], parts["smooth"])
