"""Close answers asked again: an engine of 8 bits answers first, and another in 16 or 32 bits where it hardly decides.

8 bits move every logit a little, and change a label only where the two largest lie about as close together. Such rows
are few. `compile` chose on validation rows how close is too close (`proof/margin.py`); here the rows within that margin
are asked again, of the model or of another engine made of it, and the second answer counts.

Close rows are gathered before they are asked again, over all rows that the first was given at a time, so that the
second fills its batches too.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.data.loader import Examples
from bertforge.engines.base import Engine
from bertforge.engines.run import run
from bertforge.errors import ArtifactError, UsageError
from bertforge.manifest import compile_command, weights_of
from bertforge.proof.margin import Margin, gaps
from bertforge.scales import FORMATS


class Recheck:
    """The engine that is asked again, and how many rows it was asked so far."""

    def __init__(self, engine: Engine, margin: float) -> None:
        self.engine = engine
        self.margin = margin
        """Rows whose two largest logits differ by no more are asked again."""
        self.rows = 0
        """That the first engine answered."""
        self.asked = 0
        """Of them again."""
        self._count = threading.Lock()

    def settle(self, logits: np.ndarray, examples: Examples, rows: np.ndarray) -> np.ndarray:
        """`logits` `[rows, labels]` of `rows`, with those of close rows replaced by the second engine's."""
        close = np.flatnonzero(~(gaps(logits) > self.margin))  # NaN is close
        with self._count:
            self.rows += len(rows)
            self.asked += len(close)
        if len(close):
            logits[close] = run(self.engine, examples, rows[close])
        return logits

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"precision": self.engine.precision, "margin": self.margin, "rows": self.rows, "asked": self.asked}

    def __str__(self) -> str:
        return f"asked {self.asked / max(1, self.rows):.1%} of the rows again in {self.engine.precision}"


def margin_between(engine: Path, first: dict[str, Any], other: Path, second: dict[str, Any]) -> float:
    """The margin of the engine in a folder, when the folder `other` may answer its close rows; both by their manifests.

    Raises UsageError where there is nothing to ask again or nobody better to ask, ArtifactError for an engine without a
    margin and for a folder that was made of another model.
    """
    if first["kind"] != "engine" or first["precision"] not in FORMATS:
        raise UsageError(
            f"{engine} does not answer in 8 bits: none of its rows has to be asked again; leave recheck out"
        )
    if second["kind"] == "quantized" or second.get("precision") in FORMATS:
        raise UsageError(
            f"{other} answers in 8 bits itself; recheck by a model or an engine in 16 or 32 bits, "
            f"such as bertforge compile {other} --precision fp32 makes"
            if second["kind"] == "quantized"
            else f"{other} answers in 8 bits itself; recheck by its model, or by an engine of that in 16 or 32 bits"
        )
    if "margin" not in first:
        raise ArtifactError(
            f"{engine} has no margin, for no validation rows proved it the last time; prove it on some: "
            f"{compile_command(engine, first['target'], first['precision'])} --data DATA --verify"
        )
    weights = first.get("weights")
    if weights is None or (weights, first["labels"]) != (weights_of(second), second["labels"]):
        raise ArtifactError(
            f"{other} does not hold the weights that {engine} was compiled from; recheck by the folder that it was "
            "compiled from, or by an engine that was compiled from the same"
        )
    return Margin(**first["margin"]).value
