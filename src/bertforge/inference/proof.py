"""Does an engine compute what its model does? Golden rows, then validation rows of mixed length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bertforge.backends.base import Backend, BatchShape
from bertforge.backends.receipt import describe
from bertforge.backends.run import batch_of, padding_waste, run
from bertforge.data.loader import Examples, spread
from bertforge.data.prepared import PreparedData
from bertforge.errors import ArtifactError, DataError
from bertforge.evaluation.agreement import Agreement
from bertforge.evaluation.golden import GoldenRows
from bertforge.inference.predictor import Predictor

CALIBRATION_ROWS = 300
VALIDATION_ROWS = 1000
MAX_DROP = 0.003  # accuracy on validation rows an engine may cost, a fraction
# What a logit may differ on golden rows, whose logits are the model's: float32's, or those of simulated 8 bits.
_TOLERANCE = {"fp32": 2e-3, "fp16": 0.05, "bf16": 0.25, "int8": 1.0, "fp8": 1.0}
# An engine of a quantized model has the very same ranges; what is left are values that round to the next step, which
# add up over the layers: 0.016 to 0.213 in INT8 engines of two quantized all-MiniLM-L6-v2 (2026-11-23).
_TOLERANCE_OF_QUANTIZED = 0.4


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
    rows = spread(rows, wanted)
    return Rows(predictor.examples(prepared, rows), rows)


def check_classes(labels: np.ndarray) -> None:
    """Raises DataError when the rows that calibrate are all of one class."""
    if len(np.unique(labels)) < 2:
        raise DataError("the calibration rows hold one class only; prepare a table with rows of every class")


def prove(predictor: Predictor, backend: Backend, prepared: PreparedData | None) -> dict[str, Any]:
    """Agreement with the model on golden rows and, with data, on validation rows; raises ArtifactError without it."""
    golden = GoldenRows.from_dict(predictor.manifest["golden"])
    agreement = Agreement.of(golden.logits, run(backend, golden.examples, np.arange(len(golden.logits))))
    quantized = predictor.manifest["kind"] == "quantized"
    tolerance = _TOLERANCE_OF_QUANTIZED if quantized else _TOLERANCE[backend.precision]
    if not agreement.max_logit_difference <= tolerance:  # NaN is refused too
        raise ArtifactError(
            f"the {backend.name} engine differs from the model by {agreement.max_logit_difference:.3g} in a logit of "
            f"its golden rows, more than {tolerance} for {backend.precision}"
        )
    proof: dict[str, Any] = {"products": _products(backend, golden), "golden_agreement": agreement.to_dict()}
    if prepared is not None:
        proof |= _prove_accuracy(predictor, backend, some_rows(predictor, prepared, "validation"))
    return proof


def _prove_accuracy(predictor: Predictor, backend: Backend, rows: Rows) -> dict[str, Any]:
    """The proof's part on validation rows; raises ArtifactError for a logit that is no number and for lost accuracy."""
    reference = run(predictor.backend, rows.examples, rows.rows)
    found = run(backend, rows.examples, rows.rows)
    engine = f"the {backend.name} engine in {backend.precision}"
    if broken := int((~np.isfinite(found)).any(axis=1).sum()):
        raise ArtifactError(f"{engine} gives no finite logits for {broken:,} of {len(found):,} validation rows")
    before, after = ((logits.argmax(1) == rows.labels).mean() for logits in (reference, found))
    if not before - after <= MAX_DROP:
        raise ArtifactError(
            f"{engine} loses {before - after:.2%} accuracy on {len(found):,} validation rows, more than {MAX_DROP:.1%}"
        )
    return {
        "padding_waste": padding_waste(rows.examples.lengths(rows.rows), backend.packed, backend.shape),
        "validation_agreement": Agreement.of(reference, found).to_dict(),
        "validation_accuracy": float(after),
        "validation_accuracy_model": float(before),
    }


def _products(backend: Backend, golden: GoldenRows) -> dict[str, Any] | None:
    """The receipt's part on matrix products, of the golden row of median length; None where the engine tells none."""
    lengths = golden.examples.lengths(np.arange(len(golden.logits)))
    middle = np.argsort(lengths, kind="stable")[[len(lengths) // 2]]
    products = backend.products(batch_of(golden.examples, middle, backend.packed, BatchShape(tokens=1)))
    return describe(products, backend.precision, int(lengths[middle[0]])) if products else None
