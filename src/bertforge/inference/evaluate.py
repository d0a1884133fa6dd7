"""Metrics, a paired comparison and a report of a run on labelled rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import versions
from bertforge.data.dialect import Dialect
from bertforge.data.prepared import PreparedData
from bertforge.errors import DataError
from bertforge.evaluation.bootstrap import Estimate
from bertforge.evaluation.compare import Comparison, compare
from bertforge.evaluation.curves import reliability, roc_curves
from bertforge.evaluation.decisions import Outcome, outcome
from bertforge.evaluation.groups import by_length, by_month, confident_mistakes
from bertforge.evaluation.metrics import Metrics, calibration_error, classification_metrics
from bertforge.evaluation.mistakes import CHARACTERS, KEPT, write_mistakes
from bertforge.evaluation.prior import as_text
from bertforge.evaluation.report import Report, write_report
from bertforge.evaluation.scores import softmax
from bertforge.evaluation.standing import Standing, standing
from bertforge.hardware import detect
from bertforge.inference.cascade import Recheck
from bertforge.inference.predictor import Predictor
from bertforge.inference.scoring import Scored, score
from bertforge.manifest import served

_OF_ONE_PRECISION = ("engine", "quantized")  # kinds of folder


@dataclass(frozen=True)
class Evaluation:
    """A run's metrics on one set of rows, and what they were computed from."""

    run: Path
    manifest: dict[str, Any]
    scored: Scored
    """Its logits are those of the probabilities that `predict` gives; see `Codec.calibrated`."""
    metrics: Metrics
    temperature: float
    """Fitted on validation rows when the run was trained."""
    raw_logits: np.ndarray
    """The same without the temperature, `[rows, labels]`."""
    raw_calibration_error: Estimate
    """Of them."""
    prior: dict[str, float] | None
    """The shares of the labels that probabilities are corrected for, and that the rows have; None: as they are."""
    decisions: Outcome | None
    """What the folder's thresholds do to these rows; None where none were chosen."""
    comparison: Comparison | None
    standing: Standing | None
    """Beside the baselines, on the validation or test rows of the data that the run was trained on; else None."""
    precision: str
    """What the model or engine computed in."""
    recheck: Recheck | None
    """What answered close rows again."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the metrics, with what was measured on what."""
        return {
            "run": str(self.run),
            "precision": self.precision,
            "recheck": self.recheck.to_dict() if self.recheck else None,
            "device": detect().name,
            "data": {
                "source": self.scored.source,
                "fingerprint": self.scored.fingerprint,
                "made_up": self.scored.made_up,
            },
            "rows_left_out": self.scored.left_out,
            "metrics": self.metrics.to_dict(),
            "temperature": self.temperature,
            "raw_calibration_error": self.raw_calibration_error.to_dict(),
            "prior": self.prior,
            "decisions": self.decisions.to_dict() if self.decisions else None,
            "baselines": self.standing.to_dict() if self.standing else None,
            "comparison": self.comparison.to_dict() if self.comparison else None,
            "versions": versions(),
        }

    @property
    def calibration(self) -> str:
        """What the temperature changes, in one line."""
        before, after = (_percent(error) for error in (self.raw_calibration_error, self.metrics.calibration_error))
        return (
            f"logits are divided by a temperature of {self.temperature:.2f}, fitted on validation rows; "
            f"calibration error {before} without it, {after} with it"
        )

    def write_report(
        self,
        path: Path,
        trials: Sequence[Mapping[str, Any]] | None = None,
        engines: Sequence[Mapping[str, Any]] | None = None,
    ) -> Path:
        """The HTML report, with the trials and engines of `fit` where there were any.

        Raises MachineError without the `report` extra.
        """
        scored, names = self.scored, self.metrics.label_names
        history = self.manifest.get("history")
        recipe = self.manifest["recipe"]
        report = Report(
            title=f"{recipe['name']} on {recipe['model']}",
            subtitle=f"{self.run.name}, evaluated on {scored.source}",
            made_up=scored.made_up,
            metrics=self.metrics,
            standing=self.standing,
            calibration=self.calibration,
            comparisons=(self.comparison,) if self.comparison else None,
            steps=_steps(history) if history else None,
            epochs=_epochs(history) if history else None,
            roc=roc_curves(scored.logits, scored.labels, names),
            reliability=reliability(scored.logits, scored.labels),
            uncalibrated=reliability(self.raw_logits, scored.labels),
            decisions=self.decisions,
            by_length=by_length(scored.logits, scored.labels, scored.lengths),
            by_month=None if scored.dates is None else by_month(scored.logits, scored.labels, scored.dates),
            mistakes=confident_mistakes(
                scored.logits, scored.labels, names, texts=scored.texts, row_ids=scored.lines.tolist()
            ),
            recipe=recipe,
            fingerprint=scored.fingerprint or self.manifest["data"],
            versions=self.manifest["versions"],
            trials=trials,
            engines=engines,
            quantization=self.manifest.get("quantization"),
        )
        return write_report(path, report)

    def write_mistakes(self, report: Path) -> Path:
        """The surer half of the mistakes, KEPT at most, in a file beside `report`: what `serve` shows of them."""
        wrong = int((self.scored.logits.argmax(axis=1) != self.scored.labels).sum())
        found = confident_mistakes(
            self.scored.logits,
            self.scored.labels,
            self.metrics.label_names,
            texts=self.scored.texts,
            row_ids=self.scored.lines.tolist(),
            top=min(KEPT, -(-wrong // 2)),
            characters=CHARACTERS,
        )
        return write_mistakes(report, self.scored.source, found)


def evaluate_run(
    run: Path,
    data: Path,
    part: str | None = None,
    against: Path | None = None,
    dialect: Dialect | None = None,
    *,
    recheck: Path | None = None,
    prior: Mapping[str, float] | None = None,
) -> Evaluation:
    """Scores `run` and `against` on the same rows: a part of prepared data, or a raw table written in `dialect`.

    Both are any folder that `Predictor.load` takes; `recheck` answers close rows of `run` again. With a `prior`, or
    with thresholds that were chosen for one, probabilities are corrected for it and rows are left out until the others
    have its shares. Raises DataError when the two would be scored on different rows.
    """
    predictor = Predictor.load(run, recheck=recheck, prior=prior)
    raw, scored = _scored(predictor, data, part, dialect)
    found = predictor.codec.prior
    shares = None if found is None else dict(zip(predictor.label_names, found, strict=True))
    comparison = None
    if against is not None:
        _, other = _scored(_load_beside(predictor, against, shares), data, part, dialect)
        if not (np.array_equal(other.lines, scored.lines) and np.array_equal(other.labels, scored.labels)):
            raise DataError(
                f"{run} and {against} cannot be compared: one was scored on {scored.source}, the other on "
                f"{other.source}; compare runs of one split and one set of labels"
            )
        names = (str(against), str(run))
        comparison = compare(other.logits, scored.logits, scored.labels, names=names)
    return Evaluation(
        run=run,
        manifest=predictor.manifest,
        scored=scored,
        metrics=classification_metrics(scored.logits, scored.labels, predictor.label_names),
        temperature=predictor.temperature,
        raw_logits=raw,
        raw_calibration_error=calibration_error(raw, scored.labels),
        prior=shares,
        decisions=_decisions(predictor, scored),
        comparison=comparison,
        standing=_standing(predictor, data, part or "test", scored),
        precision=predictor.precision,
        recheck=predictor.recheck,
    )


def _load_beside(first: Predictor, against: Path, prior: Mapping[str, float] | None) -> Predictor:
    """`against`, in the precision of `first` where both could compute in another, so that they differ in weights alone.

    An engine and a quantized folder have one precision. A model named with --against beside one of them computes in
    float32, from which `compile` and `quantize` measured what 8 bits cost; named first, it computes as it is served.
    """
    _, manifest = served(against)
    if manifest["kind"] in _OF_ONE_PRECISION:
        return Predictor.load(against, prior=prior)
    precision = "fp32" if first.manifest["kind"] in _OF_ONE_PRECISION else first.precision
    return Predictor.load(against, precision, prior=prior)


def _scored(predictor: Predictor, data: Path, part: str | None, dialect: Dialect | None) -> tuple[np.ndarray, Scored]:
    """The logits `[rows, labels]` without the temperature, and the rows scored with those that `predict` makes
    probabilities of.
    """
    codec = predictor.codec
    scored = score(predictor, data, part, dialect)
    if codec.prior is not None:
        scored = scored.having(codec.prior, as_text(codec.label_names, codec.prior))
    plain = replace(codec, manifest={**codec.manifest, "temperature": 1.0})
    return plain.calibrated(scored.logits), replace(scored, logits=codec.calibrated(scored.logits))


def _decisions(predictor: Predictor, scored: Scored) -> Outcome | None:
    policy = predictor.codec.policy
    return None if policy is None else outcome(policy, softmax(scored.logits), scored.labels)


def _percent(error: Estimate) -> str:
    """A share with its interval."""
    value = f"{error.value or 0.0:.2%}"  # never None: any row defines it
    return value if error.low is None or error.high is None else f"{value} ({error.low:.2%} to {error.high:.2%})"


def _standing(predictor: Predictor, data: Path, part: str, scored: Scored) -> Standing | None:
    if (
        part == "train"
        or predictor.codec.prior is not None
        or scored.fingerprint != predictor.manifest["data"]["fingerprint"]
    ):
        return None  # rows that a baseline, or the model, may have learnt from
    columns = None if predictor.transform is None else predictor.transform.spec
    return standing(PreparedData.open(data), predictor.manifest["recipe"]["split"], part, columns, scored.logits)


def _steps(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    points = [point for point in history if "train/loss" in point]
    ends = [point["step"] for point in history if "epoch" in point]
    per_epoch = ends[0] if ends else 1
    return [{"step": p["step"], "epoch": p["step"] / per_epoch, "loss": p["train/loss"]} for p in points]


def _epochs(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [
        {
            "epoch": point["epoch"],
            "train_loss": point["epoch/train_loss"],
            "validation_loss": point["epoch/validation_loss"],
            "validation_accuracy": point["epoch/validation_accuracy"],
        }
        for point in history
        if "epoch" in point
    ]
