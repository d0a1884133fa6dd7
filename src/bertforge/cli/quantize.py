"""`bertforge quantize`: 8-bit ranges for a merged model, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bertforge.terminal import Terminal

_BAR = 24  # characters of the longest bar


def quantize(
    model: Annotated[Path, typer.Argument(help="Folder made by `bertforge merge`, or by `train` in full.")],
    data: Annotated[Path, typer.Option(help="Folder made by `bertforge prepare`; its train rows calibrate.")],
    out: Annotated[Path, typer.Option(help="Folder of the quantized model; made here.")],
    precision: Annotated[str, typer.Option(help="int8, or fp8 (E4M3).")] = "int8",
    preset: Annotated[
        str, typer.Option(help="ffn, projections (the rest of the linear layers too), or attention (its products too).")
    ] = "projections",
    calibration: Annotated[
        str, typer.Option(help="best (chosen on validation rows), max, entropy, mse or percentile.")
    ] = "best",
    smooth: Annotated[float, typer.Option(help="SmoothQuant's alpha, 0 (off) to 1.")] = 0.0,
    rows: Annotated[int, typer.Option(min=2, help="Train rows to calibrate on.")] = 300,
    validation_rows: Annotated[
        int, typer.Option(min=16, help="Validation rows that judge, at most; others choose methods and parts.")
    ] = 1000,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Percentage points of accuracy that may be lost; parts go back to full precision until it is kept.",
        ),
    ] = None,
    qat: Annotated[bool, typer.Option("--qat", help="Fine-tune the quantized model for an epoch.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what was measured as JSON too.")
    ] = None,
) -> None:
    """Find 8-bit ranges for a model's matrix products, and show what each part of it costs.

    Weights have one scale per channel, activations one per tensor. LayerNorm,
    softmax and the head stay as they are. Test rows are not used.
    `bertforge compile OUT` builds engines that compute with these ranges;
    `bertforge evaluate OUT` simulates them.

    Example:

        bertforge quantize models/first --data data --out models/first-int8 \\
            --max-drop 0.3
    """
    from bertforge.artifact import output_files, write_json
    from bertforge.jobs.quantize import QuantizeOptions, quantize_model
    from bertforge.training.qat import tune

    console = Terminal()
    drop = None if max_drop is None else max_drop / 100
    options = QuantizeOptions(precision, preset, calibration, smooth, rows, validation_rows, drop)
    with output_files(json_file):
        with telling() as say:
            found = quantize_model(model, data, out, options, tune if qat else None, say)
        print_quantization(console, found)
        if json_file:
            console.print(f"wrote {write_json(json_file, found)}")
    console.print(f"wrote {out}")
    console.print(f"next: bertforge compile {out} --data {data}")


@contextmanager
def telling() -> Iterator[Callable[[str], object]]:
    """Shows what is being done: on a terminal in one line that changes, elsewhere a line for each kind of work."""
    console = Terminal(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
        return
    told = ""

    def say(text: str) -> None:
        nonlocal told
        kind = text.partition(":")[0]
        if kind != told:
            told = kind
            console.print(kind)

    yield say


def print_quantization(console: Terminal, found: dict[str, Any]) -> None:
    """What `quantize_model` measured."""
    for table in (_calibrations, _sensitivity, _frontier if found["frontier"] else None):
        if table:
            console.print(table(found))
    console.print(
        f"calibrated by {found['chosen_calibration']}; {found['quantized_share_of_work']:.0%} of the encoder's "
        "multiply-adds in 8 bits"
    )
    for name, title in (("ptq", "as calibrated"), ("qat", "fine-tuned")):
        if name in found and found[name].get("kept", True):
            console.print(f"{title}: {found[name]['recovery']:.2%} of the accuracy; {found[name]['verdict']}")
    if "qat" in found and not found["qat"]["kept"]:
        console.print(
            "fine-tuning did not lower the validation loss within the budget, so the weights stay as they were"
        )


def _calibrations(found: dict[str, Any]) -> Table:
    table = Table(title=f"ways to calibrate, {found['ranking_rows']:,} validation rows", title_justify="left", box=None)
    for name in ("calibration", "divergence", "labels changed"):
        table.add_column(name, justify="left" if name == "calibration" else "right")
    for name, cost in found["calibrations"].items():
        table.add_row(name, f"{cost['divergence']:.2g}", str(cost["changed_labels"]))
    return table


def _sensitivity(found: dict[str, Any]) -> Table:
    """Two figures a row: what quantizing it alone costs, and what sparing it alone would gain."""
    everything = found["calibrations"][found["chosen_calibration"]]["divergence"]
    longest = max(row["alone"]["divergence"] for row in found["sensitivity"]) or 1.0
    table = Table(title="sensitivity: divergence in nats", title_justify="left", box=None)
    for name in ("", "work", "alone", "gained if spared"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("alone")
    for row in found["sensitivity"]:
        alone, gained = row["alone"]["divergence"], everything - row["spared"]["divergence"]
        bar = "█" * round(_BAR * alone / longest)
        table.add_row(row["name"], f"{row['work']:.0%}", f"{alone:.2g}", f"{gained:+.2g}", bar)
    return table


def _frontier(found: dict[str, Any]) -> Table:
    table = Table(title="frontier: units taken back until the budget holds", title_justify="left", box=None)
    for name in ("units in 8 bits", "work in 8 bits", "points lost", "labels changed"):
        table.add_column(name, justify="right")
    for step in found["frontier"]:
        cost = step["cost"]
        table.add_row(
            str(len(step["quantized"])),
            f"{step['work']:.0%}",
            f"{100 * cost['accuracy_drop']:.2f}",
            str(cost["changed_labels"]),
        )
    return table
