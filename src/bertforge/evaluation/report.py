"""One evaluation as a self-contained HTML file, or its metrics as Markdown.

The HTML needs no network and runs no script; a content security policy in the file has the browser enforce both.
Everything that comes from data (texts, labels, recipe values) is escaped by Jinja. A section whose input is None
stays, with one line saying that it was left out and why. The same report gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bertforge import quiet
from bertforge.artifact import write_atomic
from bertforge.errors import MachineError
from bertforge.evaluation.bootstrap import Estimate
from bertforge.evaluation.compare import Comparison
from bertforge.evaluation.curves import ReliabilityBin, RocCurve
from bertforge.evaluation.decisions import Outcome
from bertforge.evaluation.groups import GroupAccuracy, Mistake
from bertforge.evaluation.metrics import MOST_LABELS, Metrics
from bertforge.evaluation.standing import Standing

_PAIRS = 20  # of labels most often confused, shown where there are too many labels for a matrix


@dataclass(frozen=True)
class _Shown:
    """How a metric is shown: its title, whether in percent, and what it means in one line."""

    title: str
    percent: bool
    meaning: str


_SHOWN = {
    "loss": _Shown("Loss", False, "mean cross-entropy in nats; lower is better"),
    "accuracy": _Shown("Accuracy", True, "rows labelled rightly"),
    "precision": _Shown("Precision", True, "of the rows given a label, those that have it"),
    "recall": _Shown("Recall", True, "of the rows that have a label, those given it"),
    "f1": _Shown("F1", True, "harmonic mean of precision and recall"),
    "macro_f1": _Shown("Macro F1", True, "mean F1 of the labels, a rare one as heavy as a frequent one"),
    "roc_auc": _Shown("ROC-AUC", False, "how often a positive row is ranked above a negative one"),
    "calibration_error": _Shown(
        "Calibration error", True, "mean gap between confidence and accuracy; noise only raises it"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows. None means that the input is absent; an empty tuple, that there was nothing to show.

    `made_up` puts a banner on top: the data was generated and the figures say nothing about the world.
    `steps` hold step, epoch and loss; `epochs` hold epoch, train_loss, validation_loss and validation_accuracy.
    `recipe` and `fingerprint` may nest; they are shown as dotted keys.
    """

    title: str
    subtitle: str
    made_up: bool
    metrics: Metrics
    standing: Standing | None = None
    calibration: str = ""
    """What the temperature changed, in one line."""
    comparisons: Sequence[Comparison] | None = None
    steps: Sequence[Mapping[str, float]] | None = None
    epochs: Sequence[Mapping[str, float]] | None = None
    roc: Sequence[RocCurve] | None = None
    reliability: Sequence[ReliabilityBin] | None = None
    uncalibrated: Sequence[ReliabilityBin] = ()
    """The same without the temperature."""
    decisions: Outcome | None = None
    """What thresholds do to these rows."""
    by_length: Sequence[GroupAccuracy] | None = None
    by_month: Sequence[GroupAccuracy] | None = None
    mistakes: Sequence[Mistake] | None = None
    recipe: Mapping[str, Any] | None = None
    fingerprint: Mapping[str, Any] | str | None = None
    versions: Mapping[str, str] | None = None
    trials: Sequence[Mapping[str, Any]] | None = None
    """Of settings by `bertforge fit`, the best of the longest first: name, rows_seen, loss, accuracy, seconds."""
    engines: Sequence[Mapping[str, Any]] | None = None
    """Tried by `bertforge fit`, the kept one first: target, precision, questions_per_s and accuracy, or `why` not."""
    quantization: Mapping[str, Any] | None = None
    """What `bertforge quantize` measured."""


def write_report(path: Path, report: Report) -> Path:
    """Writes `report` as one HTML file, atomically. Raises MachineError when the `report` extra is not installed."""
    try:
        import jinja2

        quiet.load("matplotlib")  # the figures load it where they draw
    except ImportError as error:
        raise MachineError("reports need jinja2 and matplotlib: pip install 'bertforge[report]'") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=_number, interval=_interval, percent=_percent)
    template = resources.files("bertforge.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    html = environment.from_string(template).render(
        report=report,
        metrics=report.metrics,
        headline=[(name, _SHOWN[name], found) for name, found in report.metrics.scalars().items()],
        method=_method(report.metrics),
        confused=_most_confused(report.metrics) if len(report.metrics.label_names) > MOST_LABELS else None,
        figures=_figures(report),
        fastest=max((row.get("questions_per_s", 0.0) for row in report.engines or ()), default=0.0),
        recipe=_flat(report.recipe),
        fingerprint=_flat({"data": report.fingerprint} if isinstance(report.fingerprint, str) else report.fingerprint),
    )
    return write_atomic(Path(path), html)


def metrics_markdown(metrics: Metrics) -> str:
    """The scalar metrics with their intervals as a Markdown table, with a line on how they were made."""
    lines = ["| metric | value | 95% interval |", "| --- | --- | --- |"]
    for name, found in metrics.scalars().items():
        shown = _SHOWN[name]
        value = f"undefined: {found.reason}" if found.value is None else _number(found.value, shown.percent)
        lines.append(
            "| " + " | ".join(_cell(text) for text in (shown.title, value, _interval(found, shown.percent))) + " |"
        )
    return "\n".join([*lines, "", _method(metrics)])


def _method(metrics: Metrics) -> str:
    """What the numbers are of, in one line."""
    return (
        f"{metrics.rows:,} rows. Precision, recall, F1 and ROC-AUC: {metrics.average}. "
        f"Intervals are from {metrics.bootstrap:,} bootstrap resamples of the rows."
    )


def _most_confused(metrics: Metrics) -> list[tuple[str, str, float, float]]:
    """The pairs of labels taken most often for one another: true, predicted, rows, share of the true label's rows."""
    counts = np.array([[cell.value for cell in row] for row in metrics.confusion])
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    ranked = np.argsort(-counts, axis=None, kind="stable")[:_PAIRS]
    names = metrics.label_names
    return [
        (names[true], names[predicted], counts[true, predicted], counts[true, predicted] / totals[true])
        for true, predicted in zip(*np.unravel_index(ranked, counts.shape), strict=True)
        if counts[true, predicted]
    ]


def _figures(report: Report) -> dict[str, Any]:
    """The figures whose input is there, as markup that Jinja does not escape again."""
    from markupsafe import Markup

    from bertforge.evaluation import figures

    drawn: dict[str, str] = {}
    if report.steps or report.epochs:
        drawn["loss"] = figures.loss_curves(report.steps or (), report.epochs or ())
    if report.roc:
        drawn["roc"] = figures.roc(report.roc)
    if report.reliability:
        drawn["calibration"] = figures.calibration(report.reliability, report.uncalibrated)
    accuracy = report.metrics.accuracy.value or 0.0  # never None: any row defines it
    if report.by_length:
        drawn["length"] = figures.groups(report.by_length, accuracy, "length in tokens")
    if report.by_month:
        drawn["month"] = figures.groups(report.by_month, accuracy, "month")
    return {name: Markup(svg) for name, svg in drawn.items()}


def _flat(fields: Mapping[str, Any] | None, prefix: str = "") -> dict[str, str] | None:
    """Nested fields as dotted keys: `{"a": {"b": 1}}` is shown as `a.b` 1."""
    if fields is None:
        return None
    flat: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.") or {}
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.2f}%" if percent else f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _interval(found: Estimate, percent: bool) -> str:
    if found.low is None or found.high is None:
        return "" if found.value is None else found.reason
    return f"{_number(found.low, percent)} to {_number(found.high, percent)}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
