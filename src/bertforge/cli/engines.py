"""`bertforge compile` and `bertforge benchmark`: from a merged model to fast inference, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Model = Annotated[Path, typer.Argument(help="Folder made by `bertforge merge`, or by `train` in full.")]


def compile_(
    model: Model,
    target: Annotated[str, typer.Option(help="openvino or onnxruntime.")] = "openvino",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or int8, as the target has them.")] = "bf16",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder made by `bertforge prepare`: train rows calibrate int8, validation rows prove it."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the engine; made here.", show_default="MODEL/engines/TARGET-PRECISION"),
    ] = None,
) -> None:
    """Build an engine and show that it computes what the model does.

    The engine is loaded from what was written and run on the model's golden
    rows, and on validation rows with --data. One that differs too much is
    not kept. `bertforge predict ENGINE TABLE` runs it.

    Example:

        bertforge compile models/first --target openvino --precision int8 \\
            --data data
    """
    from bertforge.backends.receipt import verdict
    from bertforge.evaluation.agreement import Agreement
    from bertforge.inference.compile import compile_model, default_folder

    console = Console(highlight=False, soft_wrap=True, markup=False)
    folder = out or default_folder(model, target, precision)
    with Console(stderr=True).status(f"building {target} {precision}"):
        receipt = compile_model(model, target, precision, data, folder)
    console.print(f"golden rows: {Agreement(**receipt['golden_agreement'])}")
    if "validation_agreement" in receipt:
        console.print(f"validation rows: {Agreement(**receipt['validation_agreement'])}")
        before, after = receipt["validation_accuracy_fp32"], receipt["validation_accuracy"]
        console.print(f"accuracy on them: {after:.2%}, {before:.2%} in float32")
    if receipt["products"]:
        console.print(verdict(receipt["products"], receipt["precision"]))
    size, seconds = receipt["bytes"] / 1e6, receipt["build_seconds"]
    console.print(f"wrote {folder}: {size:,.0f} MB, built in {seconds:.0f} s; bertforge.json is its receipt")
    console.print(f"next: bertforge predict {folder} TABLE --out predictions.csv")


def benchmark(
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder made by `bertforge prepare`.")],
    targets: Annotated[
        str, typer.Option(help="all, or TARGET or TARGET-PRECISION, several with commas: openvino,pytorch-fp32.")
    ] = "all",
    split: Annotated[str, typer.Option(help="Part of the data to run: train, validation or test.")] = "validation",
    rows: Annotated[int, typer.Option(min=32, help="Rows timed, spread over the part.")] = 500,
    repeats: Annotated[int, typer.Option(min=1, help="Times each figure is measured.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and its JSON.", show_default="MODEL/benchmark")
    ] = None,
) -> None:
    """Compare engines and precisions: speed, latency, accuracy and what it costs.

    Engines that were not compiled yet are compiled first, into
    MODEL/engines. Every engine runs the same rows of real lengths; accuracy
    is that of the whole part, set against PyTorch in float32 row by row.

    Example:

        bertforge benchmark models/first --data data --targets openvino
    """
    from bertforge.benchmark.run import run_benchmark
    from bertforge.benchmark.table import summary, write

    console = Console(highlight=False, soft_wrap=True, markup=False)
    found = run_benchmark(model, data, targets, split=split, rows=rows, repeats=repeats, say=console.print)
    console.print(summary(found))
    for path in write(out or model / "benchmark", found):
        console.print(f"wrote {path}")
