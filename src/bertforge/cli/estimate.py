"""`bertforge train --estimate`: the measured cost of the variants, as two tables that fit a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from bertforge.terminal import Terminal

if TYPE_CHECKING:
    from bertforge.training.config import Recipe

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]

_SPEED: Columns = {
    "trainable": lambda row: f"{row['trainable_parameters']:,}",
    "epoch": lambda row: _time(row["seconds_per_epoch"]),
    "validation": lambda row: _time(row["validation_seconds"]),
    "rows/s": lambda row: f"{row['questions_per_s']:,.1f}",
    "memory GB": lambda row: "-" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.2f}",
}
_COST: Columns = {
    "set-up": lambda row: _time(row["set_up_seconds"]),
    "hours/epoch": lambda row: f"{row['device_hours_per_epoch']:.3g}",
    "hours/run": lambda row: f"{row['device_hours']:.3g}",
}
_MONEY: Columns = {
    "cost/epoch": lambda row: _money(row["cost_per_epoch"]),
    "cost/run": lambda row: _money(row["cost"]),
}


def show_estimate(data: Path, recipe: Recipe, price_per_hour: float | None, json_file: Path | None) -> None:
    """Measures, prints the tables and writes `json_file`."""
    from bertforge.artifact import write_json
    from bertforge.cli.quantize import telling
    from bertforge.training.estimate import estimate

    with telling() as say:
        found = estimate(data, recipe, price_per_hour, say=say)
    console = Terminal()
    console.print(
        f"{found['model']} on {found['device']}, {found['precision']}; "
        f"{found['train_rows']:,} train and {found['validation_rows']:,} validation rows"
    )
    for columns in (_SPEED, _COST if price_per_hour is None else _COST | _MONEY):
        console.print(_table(found["rows"], columns))
    for row in found["rows"]:
        if "missing" in row:
            console.print(f"{row['variant']}: {row['missing']}")
        elif row["later_seconds"] != row["train_seconds"]:
            later = _time(row["later_seconds"] + row["validation_seconds"])
            note = "frozen layers are computed once"
            if row["later_seconds"] > 0.95 * row["train_seconds"]:
                note += ", which brings nothing here; --set prefix_cache_gb=0 keeps none of their output"
            console.print(f"{row['variant']}: {later} an epoch from the second on: {note}")
    epochs = ", ".join(f"{row['variant']} {row['epochs']}" for row in found["rows"] if "missing" not in row)
    console.print(
        f"epoch: training and the validation after it; run: the epochs of its recipe ({epochs}); set-up: once a run, "
        f"not in it; memory: the most that {found['peak_memory_of']} held"
    )
    for row in found["rows"]:
        if row.get("busy"):
            console.print(_busy(row))
    if json_file:
        console.print(f"wrote {write_json(json_file, found)}")
    console.print("next: the same command with --out runs/first and a --variant instead of --estimate")


def _table(rows: Iterable[Row], columns: Columns) -> Table:
    """A variant without figures has dashes; why is told beneath."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["variant"], *("-" if "missing" in row else cell(row) for cell in columns.values()))
    return table


def _busy(row: Row) -> str:
    """Why the figures are too high."""
    reasons = []
    if row["waited"] is not None:
        reasons.append(f"other programs held the cores for {row['waited']:.0%} of the time")
    if row["train_seconds_low"] != row["train_seconds_high"]:
        low, high = (_time(row[f"train_seconds_{end}"]) for end in ("low", "high"))
        reasons.append(f"an epoch of training would take {low} by the fastest steps and {high} by the slowest")
    return f"{row['variant']}: the machine is busy: {' and '.join(reasons)}; it takes less time on an idle machine"


def _money(amount: float) -> str:
    """To the cent, and small amounts to two figures: an epoch on a GPU may cost less than a cent."""
    decimals = 2 if amount >= 0.1 or not amount else 1 - math.floor(math.log10(amount))
    return f"{amount:,.{decimals}f}"


def _time(seconds: float) -> str:
    """In the unit that keeps the figure short."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
