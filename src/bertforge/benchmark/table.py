"""A benchmark's rows as Markdown and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bertforge.artifact import write_atomic, write_json

_HEADER = [
    *("framework", "precision", "questions/s", "speed-up", "from text", "batch 1", "batch 32", "p50 / p95 / p99 ms"),
    *("accuracy", "recovery", "p", "labels changed", "padding", "MB"),
]


def markdown(found: dict[str, Any]) -> str:
    """One row an engine; the speed-up is over the first."""
    first = found["rows"][0].get("questions_per_s")
    lines = [_HEADER, ["---"] * len(_HEADER)]
    lines += [_cells(row, first) for row in found["rows"]]
    note = (
        f"{found['device']}; {found['rows_timed']:,} questions of {found['tokens_per_question']:.0f} tokens, "
        f"median of {found['repeats']}; accuracy on {found['split']}. From text: tokenizing included. "
        "Batch 1, 32: rows a batch at most, sorted by length. p50: one row a call. "
        "Recovery: accuracy as a share of the first row's. p: McNemar's against the first row. "
        "Padding: tokens computed beyond the real ones."
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{note}"


def write(folder: Path, found: dict[str, Any]) -> list[Path]:
    """`table.md` and `benchmark.json`; returns what was written."""
    return [
        write_atomic(folder / "table.md", markdown(found) + "\n"),
        write_json(folder / "benchmark.json", found),
    ]


def _cells(row: dict[str, Any], first: float | None) -> list[str]:
    if "missing" in row:
        return [row["framework"], row["precision"], row["missing"], *[""] * (len(_HEADER) - 3)]
    return [
        row["framework"],
        row["precision"],
        f"{row['questions_per_s']:,.1f}",
        f"{row['questions_per_s'] / first:.2f}" if first else "-",
        f"{row['end_to_end_questions_per_s']:,.1f}",
        f"{row['questions_per_s_batch_1']:,.1f}",
        f"{row['questions_per_s_batch_32']:,.1f}",
        f"{row['p50_ms']:.1f} / {row['p95_ms']:.1f} / {row['p99_ms']:.1f}",
        f"{row['accuracy']:.2%}",
        f"{row['recovery']:.2%}",
        f"{row['mcnemar_p']:.2g}",
        f"{row['changed_labels']:,} of {row['accuracy_rows']:,}",
        f"{row['padding_waste']:.1%}",
        f"{row['bytes'] / 1e6:,.0f}",
    ]
