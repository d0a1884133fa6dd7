"""Does an engine compute what its model does? Golden rows, then validation rows of mixed length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bertforge.backends.base import Backend, BatchShape
from bertforge.backends.receipt import describe
from bertforge.backends.run import batch_of, padding_waste, run
from bertforge.data.loader import Examples
from bertforge.data.prepared import PreparedData
from bertforge.errors import ArtifactError
from bertforge.evaluation.agreement import Agreement
from bertforge.evaluation.golden import GoldenRows
from bertforge.inference.predictor import Predictor

CALIBRATION_ROWS = 300
VALIDATION_ROWS = 1000
MAX_DROP = 0.003  # accuracy on validation rows an engine may cost, a fraction
# What a logit may differ on golden rows, whose logits are float32's.
_TOLERANCE = {"fp32": 2e-3, "fp16": 0.05, "bf16": 0.25, "int8": 1.0, "fp8": 1.0}


@dataclass(frozen=True)
class Rows:
    """Rows of prepared data for one purpose."""

    examples: Examples
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """[rows]."""
        return np.asarray(self.examples.labels[self.rows])


def some_rows(predictor: Predictor, prepared: PreparedData, part: str) -> Rows:
    """Rows spread over a part of the data: for calibration from train, for judgement from validation."""
    rows = prepared.rows(predictor.manifest["recipe"]["split"], part)
    wanted = CALIBRATION_ROWS if part == "train" else VALIDATION_ROWS
    rows = rows[np.linspace(0, len(rows) - 1, min(wanted, len(rows))).astype(int)]
    return Rows(predictor.examples(prepared, rows), rows)


def prove(predictor: Predictor, backend: Backend, prepared: PreparedData | None) -> dict[str, Any]:
    """Agreement with the model on golden rows and, with data, on validation rows; raises ArtifactError without it."""
    golden = GoldenRows.from_dict(predictor.manifest["golden"])
    agreement = Agreement.of(golden.logits, run(backend, golden.examples, np.arange(len(golden.logits))))
    if not agreement.max_logit_difference <= _TOLERANCE[backend.precision]:
        raise ArtifactError(
            f"the {backend.name} engine differs from the model by {agreement.max_logit_difference:.3g} in a logit of "
            f"its golden rows, more than {_TOLERANCE[backend.precision]} for {backend.precision}; nothing was written"
        )
    proof: dict[str, Any] = {"products": _products(backend, golden), "golden_agreement": agreement.to_dict()}
    if prepared is not None:
        rows = some_rows(predictor, prepared, "validation")
        reference = run(predictor.backend, rows.examples, rows.rows)
        found = run(backend, rows.examples, rows.rows)
        before, after = ((logits.argmax(1) == rows.labels).mean() for logits in (reference, found))
        proof["padding_waste"] = padding_waste(rows.examples.lengths(rows.rows), backend.packed, backend.shape)
        proof["validation_agreement"] = Agreement.of(reference, found).to_dict()
        proof |= {"validation_accuracy": float(after), "validation_accuracy_fp32": float(before)}
        if not before - after <= MAX_DROP:
            raise ArtifactError(
                f"the {backend.name} engine in {backend.precision} loses {before - after:.2%} accuracy on "
                f"{len(rows.rows):,} validation rows, more than {MAX_DROP:.1%}; nothing was written"
            )
    return proof


def _products(backend: Backend, golden: GoldenRows) -> dict[str, Any] | None:
    """The receipt's part on matrix products, of the golden row of median length; None where the engine tells none."""
    lengths = golden.examples.lengths(np.arange(len(golden.logits)))
    middle = np.argsort(lengths, kind="stable")[[len(lengths) // 2]]
    products = backend.products(batch_of(golden.examples, middle, backend.packed, BatchShape(tokens=1)))
    return describe(products, backend.precision, int(lengths[middle[0]])) if products else None
