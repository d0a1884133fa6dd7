"""What is run: rows of real lengths, and the frameworks that are put beside one another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from bertforge.data.loader import Examples, spread
from bertforge.data.prepared import PreparedData
from bertforge.engines.pytorch import PyTorchEngine
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor

PADDED = "pytorch-padded"


@dataclass(frozen=True)
class Workload:
    """The rows of a benchmark."""

    examples: Examples
    rows: np.ndarray
    """The whole part, for accuracy."""
    timed: np.ndarray
    texts: list[str]
    """Of the timed rows."""
    columns: pd.DataFrame | None
    """Of the timed rows, where the model reads columns beside the text."""

    @classmethod
    def of(cls, predictor: Predictor, prepared: PreparedData, split: str, rows: int) -> Workload:
        """`rows` of a part to time, in no order of length, as questions come, and all of it for accuracy."""
        whole = prepared.rows(predictor.manifest["recipe"]["split"], split)
        timed = spread(whole, rows)
        timed = np.random.default_rng(0).permutation(timed)
        columns = predictor.columns(prepared, timed)
        return cls(predictor.examples(prepared, whole), whole, timed, prepared.texts(timed), columns)

    @property
    def labels(self) -> np.ndarray:
        """[rows]."""
        return np.asarray(self.examples.labels[self.rows])


def load(folder: Path, framework: str, precision: str) -> Predictor:
    """What a row measures: an engine, or the model itself on packed or on padded batches."""
    predictor = Predictor.load(folder, precision)
    if framework != PADDED:
        return predictor
    packed = predictor.engine
    assert isinstance(packed, PyTorchEngine)
    return replace(predictor, engine=PyTorchEngine(packed.model, detect(), packed.precision, packed=False))
