"""A benchmark's rows for the terminal, as Markdown, as JSON and as a bar chart."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from bertforge import quiet
from bertforge.artifact import write_atomic, write_json
from bertforge.engines.measure import PAUSE_S

Row = dict[str, Any]
_COLOUR = "#2a78d6"

# Title -> how a row shows it. `speed-up` and `of the fastest` need the other rows and are added by `_cells`.
_SHOWN: dict[str, Callable[[Row], str]] = {
    "rows/s": lambda row: f"{row['questions_per_s']:,.1f}",
    "from text": lambda row: f"{row['end_to_end_questions_per_s']:,.1f}",
    "batch 1": lambda row: f"{row['questions_per_s_batch_1']:,.1f}",
    "batch 32": lambda row: f"{row['questions_per_s_batch_32']:,.1f}",
    "p50 / p95 / p99 / cold ms": lambda row: _latency(row, ""),
    "tokenizer's": lambda row: _latency(row, "tokenizer_"),
    "text to label": lambda row: _latency(row, "text_"),
    "first call ms": lambda row: _or_dash(row["first_call_ms"], _ms),
    "first answer s": lambda row: _or_dash(row["first_answer_s"], "{:.1f}".format),
    "accuracy": lambda row: f"{row['accuracy']:.2%}",
    "recovery (95%)": lambda row: _between(row),
    "p": lambda row: f"{row['mcnemar_p']:.2g}",
    "changed": lambda row: f"{row['changed_labels']:,} of {row['accuracy_rows']:,}",
    "ceiling": lambda row: _or_dash(row["share_of_ceiling"], "{:.0%}".format),
    "padding": lambda row: f"{row['padding_waste']:.1%}",
    "memory GB": lambda row: _or_dash(row["peak_memory_gb"], "{:.2f}".format),
    "MB": lambda row: f"{row['bytes'] / 1e6:,.0f}",
}
# What fits into 80 columns, in blocks.
_BLOCKS = (
    ("rows/s", "speed-up", "accuracy", "changed"),
    ("recovery (95%)", "p", "ceiling"),
    ("from text", "batch 1", "batch 32", "memory GB"),
    ("p50 / p95 / p99 / cold ms", "tokenizer's"),
    ("text to label", "first answer s"),
)


def markdown(found: dict[str, Any]) -> str:
    """One row an engine, all columns; the speed-up is over the first."""
    header = ["framework", "precision", "rows/s", "speed-up", *list(_SHOWN)[1:]]
    lines = [header, ["---"] * len(header)]
    for row in found["rows"]:
        name = _name(row).split(" ", 1)
        if "missing" in row:
            lines.append([*name, row["missing"], *[""] * (len(header) - 3)])
        else:
            lines.append([*name, *_cells(found, row, header[2:])])
    note = (
        f"{found['device']}; {found['rows_timed']:,} rows of {found['tokens_per_question']:.0f} tokens and "
        f"{found['gflop_per_question']:.2f} GFLOP, median of {found['repeats']}; accuracy on {found['split']}. "
        "From text: tokenizing included. Batch 1, 32: rows a batch at most, sorted by length. "
        "p50, p95, p99: milliseconds of one question a call, from token ids to logits. Tokenizer's, text to label: the "
        f"same of the tokenizer, and of both together. Cold: the median after a pause of {PAUSE_S:g} s, with the CPU's "
        "caches full of something else. First call, first answer: in a process of its own, with the engine loaded, "
        "and from the start of the process. "
        "Recovery: accuracy as a share of the first row's, with the paired interval. p: McNemar's against the first "
        "row. Changed: labels other than the first row's; benchmark.json names the lines. "
        "Ceiling: the work needed, as a share of the fastest matrix product in that precision here; "
        "- where none was measured or the engine was faster, so that the product was measured on a busier machine. "
        "Padding: tokens computed beyond the real ones. Memory: the most that a process of its own held."
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{note}"


def summary(found: dict[str, Any]) -> Group:
    """The same for a terminal of 80 columns: three tables, and a line for each figure that is missing."""
    measured = [row for row in found["rows"] if "missing" not in row]
    tables = []
    for columns in _BLOCKS:
        table = Table(box=SIMPLE, pad_edge=False)
        table.add_column("engine", no_wrap=True)
        for title in columns:
            table.add_column(title, justify="right", no_wrap=True)
        for row in measured:
            table.add_row(_name(row), *_cells(found, row, columns))
        tables.append(table)
    notes = [f"{_name(row)}: {row['missing']}" for row in found["rows"] if "missing" in row]
    if measured:
        notes += [
            "One question, ms: p50 / p95 / p99 / cold, after half a second of pause.",
            "Engine: token ids to logits. Text to label: with the tokenizer.",
            "First answer: of a new process.",
        ]
    if any(row["share_of_ceiling"] is None and row["product_rate"] for row in measured):
        notes.append(
            "no ceiling for an engine that was faster than the matrix product measured beside it: other work held the "
            "cores meanwhile; measure again on an idle machine"
        )
    return Group(*tables, *notes)


def write(folder: Path, found: dict[str, Any]) -> list[Path]:
    """`table.md`, `benchmark.json` and, where Matplotlib is installed, `chart.svg`; returns what was written."""
    written = [
        write_atomic(folder / "table.md", markdown(found) + "\n"),
        write_json(folder / "benchmark.json", found),
    ]
    try:
        quiet.load("matplotlib")  # `_chart` loads it where it draws
    except ImportError:
        return written
    return [*written, write_atomic(folder / "chart.svg", _chart(found))]


def _name(row: Row) -> str:
    """Framework and precision, as its receipt labels it."""
    is_mixed = (row.get("products") or {}).get("label") == "mixed"
    return f"{row['framework']} {row['precision']}" + (" mixed" if is_mixed else "")


def _cells(found: dict[str, Any], row: Row, titles: Sequence[str]) -> list[str]:
    speed_up = row["questions_per_s"] / found["rows"][0]["questions_per_s"]
    return [f"{speed_up:.2f}" if title == "speed-up" else _SHOWN[title](row) for title in titles]


def _latency(row: Row, of: str) -> str:
    return " / ".join(_ms(row[f"{of}{name}_ms"]) for name in ("p50", "p95", "p99", "cold"))


def _ms(value: float) -> str:
    """To three digits or so: 0.41, 5.13, 12.3, 123."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _or_dash(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)


def _between(row: Row) -> str:
    if row["recovery_low"] is None:
        return f"{row['recovery']:.2%}"
    return f"{row['recovery']:.2%} ({100 * row['recovery_low']:.1f} to {100 * row['recovery_high']:.1f})"


def _chart(found: dict[str, Any]) -> str:
    """Rows a second as bars, the accuracy beside each, as a standalone SVG."""
    matplotlib = quiet.load("matplotlib")
    rows = [row for row in found["rows"] if "missing" not in row]
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "bertforge", "font.size": 9}):
        figure = quiet.load("matplotlib.figure").Figure(figsize=(7.5, 0.8 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([_name(row) for row in rows], [row["questions_per_s"] for row in rows], color=_COLOUR)
        shown = [f"{row['questions_per_s']:,.0f}   {row['accuracy']:.2%} right" for row in rows]
        axes.bar_label(bars, shown, padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.set(xlabel="rows/s")
        axes.set_title(f"{found['device']}; {found['rows_timed']:,} rows", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
