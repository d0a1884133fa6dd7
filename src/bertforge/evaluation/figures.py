"""The report's figures, as SVG text to put inline into HTML.

Drawn with Matplotlib's object API, without pyplot and its global figures. Two things make them fit the page:
- Colours are placeholders that become CSS variables (`var(--ink)`), so a figure follows the page into dark mode.
- Text stays text (`svg.fonttype` none) in the page's font, so it can be selected and stays small.
The same input gives the same bytes: ids come from a fixed salt and no date is written.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np

from bertforge import quiet
from bertforge.evaluation.curves import ReliabilityBin, RocCurve
from bertforge.evaluation.groups import GroupAccuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK, MUTED, LINE = "#010101", "#020202", "#030303"
ACCENT, SECOND, THIRD = "#040404", "#050505", "#060606"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SECOND: "second", THIRD: "third"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bertforge",
    "text.parse_math": False,  # a label may hold dollar signs
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
_SMALL, _WIDE = (4.7, 3.6), (9.6, 3.2)  # inches
_MAX_POINTS = 300
_SERIES = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in (ACCENT, SECOND, THIRD)]


def _svg(size: tuple[float, float]) -> Callable[[Callable[Concatenate[Figure, P], None]], Callable[P, str]]:
    """Turns a function that draws on a figure into one that returns the figure as SVG text."""

    def decorate(draw: Callable[Concatenate[Figure, P], None]) -> Callable[P, str]:
        @wraps(draw)
        def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
            matplotlib = quiet.load("matplotlib")
            file = io.StringIO()
            with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
                # The page's own font draws the text; Matplotlib's only measures it, and lacks many scripts.
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")
                figure = quiet.load("matplotlib.figure").Figure(figsize=size, layout="constrained")
                draw(figure, *args, **kwargs)
                figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
            return _inline(file.getvalue())

        return drawn

    return decorate


def _inline(svg: str) -> str:
    """A standalone SVG file made fit for HTML: no prologue, no metadata, no repeated ids, colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are a page's, not a figure's. Nothing refers to a group's; markers and clip paths get the figure's own prefix.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    prefix = "f" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(id="|#)([mp][0-9a-f]{10})\b', rf"\1{prefix}-\2", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


@_svg(_WIDE)
def loss_curves(figure: Figure, steps: Sequence[Mapping[str, float]], epochs: Sequence[Mapping[str, float]]) -> None:
    """Training loss by step with each epoch's losses on the left, validation accuracy by epoch on the right.

    `steps` hold step, epoch and loss; `epochs` hold epoch, train_loss, validation_loss and validation_accuracy.
    An epoch stands at its last step.
    """
    left, right = figure.subplots(1, 2, width_ratios=(2, 1), gridspec_kw={"wspace": 0.08})
    block = math.ceil(len(steps) / _MAX_POINTS)
    if steps:
        blocks = [steps[start : start + block] for start in range(0, len(steps), block)]
        label = "training, the epoch so far"
        means = [float(np.mean([step["loss"] for step in part])) for part in blocks]
        left.plot([part[-1]["step"] for part in blocks], means, color=ACCENT, alpha=0.55, linewidth=1, label=label)
    if epochs:
        ends = [max((s["step"] for s in steps if s["epoch"] <= e["epoch"]), default=e["epoch"]) for e in epochs]
        left.plot(ends, [e["train_loss"] for e in epochs], "o--", color=ACCENT, label="training, whole epoch")
        left.plot(ends, [e["validation_loss"] for e in epochs], "s-", color=SECOND, label="validation")
        numbers = [e["epoch"] for e in epochs]
        right.plot(numbers, [100 * e["validation_accuracy"] for e in epochs], "s-", color=SECOND)
        right.set_xticks(numbers[:: math.ceil(len(numbers) / 10)])
    left.set(xlabel="step" if steps else "epoch", ylabel="loss (nats)")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    left.legend()


@_svg(_SMALL)
def roc(figure: Figure, curves: Sequence[RocCurve]) -> None:
    """One line per curve and the diagonal of guessing; a legend when there are few enough lines to tell apart."""
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    lines = []
    for index, curve in enumerate(curves):
        shown = np.unique(np.linspace(0, len(curve.thresholds) - 1, _MAX_POINTS).round().astype(int))
        colour, dash = _SERIES[index % len(_SERIES)]
        x, y = curve.false_positive_rate[shown], curve.true_positive_rate[shown]
        lines += axes.plot(x, y, color=colour, linestyle=dash)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01))
    if len(curves) <= len(_SERIES):
        legend = axes.legend(lines, [""] * len(lines), loc="lower right")
        for text, curve in zip(legend.get_texts(), curves, strict=True):
            text.set_text(curve.label)  # given to legend(), a label that starts with "_" would be left out


@_svg(_SMALL)
def calibration(figure: Figure, bins: Sequence[ReliabilityBin], before: Sequence[ReliabilityBin] = ()) -> None:
    """Accuracy against confidence by bin, with the diagonal of perfect calibration, above the share of rows; `before`
    is what they were without the temperature.
    """
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    start = 100 * bins[0].above
    top.plot((start, 100), (start, 100), color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    if before:
        points = [100 * b.confidence for b in before], [100 * b.accuracy.accuracy for b in before]
        top.plot(*points, "s--", color=SECOND, alpha=0.55, linewidth=1, label="without the temperature")
    _whiskers(top, [100 * b.confidence for b in bins], [b.accuracy for b in bins])
    if before:
        top.plot([], [], "o", color=ACCENT, label="with it")
        top.legend(loc="upper left")
    total = sum(b.accuracy.rows for b in bins)
    middles = [50 * (b.above + b.up_to) for b in bins]
    shares, width = [100 * b.accuracy.rows / total for b in bins], 88 * (bins[0].up_to - bins[0].above)
    bottom.bar(middles, shares, width=width, color=ACCENT, alpha=0.45)
    top.set(ylabel="accuracy (%)")
    bottom.set(xlabel="confidence: probability of the predicted label (%)", ylabel="rows (%)", xlim=(start, 100.5))


@_svg(_WIDE)
def groups(figure: Figure, found: Sequence[GroupAccuracy], overall: float, xlabel: str) -> None:
    """Accuracy of each group with its interval and a line at the `overall` accuracy, above the number of rows."""
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    places = range(len(found))
    top.axhline(100 * overall, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    _whiskers(top, list(places), found)
    bottom.bar(places, [group.rows for group in found], width=0.6, color=ACCENT, alpha=0.45)
    top.set(ylabel="accuracy (%)")
    bottom.set(xlabel=xlabel, ylabel="rows", xlim=(-0.6, len(found) - 0.4))
    bottom.set_xticks(places, [group.name for group in found], rotation=90 if len(found) > 12 else 0)
    for axes in (top, bottom):
        axes.grid(visible=False, axis="x")


def _whiskers(axes: Axes, x: Sequence[float], found: Sequence[GroupAccuracy]) -> None:
    """Dots at the accuracies (in %) with whiskers over their intervals."""
    y = [100 * group.accuracy for group in found]
    axes.vlines(x, [100 * g.low for g in found], [100 * g.high for g in found], color=ACCENT, alpha=0.6, linewidth=1.4)
    axes.plot(x, y, "o", color=ACCENT)
