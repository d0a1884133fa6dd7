"""`bertforge compile` and `bertforge benchmark`: from a merged model to fast inference, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from bertforge.manifest import compile_command
from bertforge.scales import FORMATS
from bertforge.terminal import Terminal

Model = Annotated[Path, typer.Argument(help="Folder made by `bertforge merge`, by `train` in full, or by `quantize`.")]


def compile_(
    model: Model,
    target: Annotated[str, typer.Option(help="auto, or a target that `bertforge doctor` lists.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, fp32, fp16, bf16, int8 or fp8, as the target has them.")
    ] = "auto",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder that the model was trained on: train rows calibrate 8 bits, validation rows check the engine."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the engine; made here.",
            show_default="MODEL/engines/TARGET-PRECISION, or MODEL/engines/auto where engines are compared",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Build nothing; check the engine in --out, or that of --target and --precision."),
    ] = False,
) -> None:
    """Build an engine and show that it computes what the model does.

    The engine is loaded again from its files. Probes with nothing rounded
    show that every part of the model is there. The rows saved with the
    model, and validation rows with --data, show that its precision moves
    the probabilities no more than it must. An engine that is shown to lose
    accuracy is not kept. Where 8 bits cost too much, the layers that suffer
    most are spared.

    With --data, auto builds every engine that this machine can run, times
    those that pass, and keeps the fastest. Without --data, it
    builds one engine: bfloat16 where the CPU supports it, else float32. A
    quantized folder is compiled in its own 8 bits, and beside them in 16 or
    32, for 8 bits are not always faster.

    `bertforge predict ENGINE TABLE` runs the engine.

    native, our own engine, runs on NVIDIA GPUs from Ampere on, in fp8 from
    Ada on. tensorrt builds on the GPU it will run on. tensorrt-rtx runs on
    GPUs of compute capability 8.0, 8.6, 8.9 and 12.x. native and
    tensorrt-rtx build anywhere; what was built without a GPU can be used
    after --verify on one.

    Example:

        bertforge compile models/first --data data
    """
    from bertforge.engines.fastest import AUTO, candidates
    from bertforge.errors import UsageError
    from bertforge.hardware import detect
    from bertforge.jobs.compile import compile_fastest, compile_model, default_folder, verify_engine

    console = Terminal()
    say = Terminal(stderr=True).print
    if verify:
        if out is None and AUTO in (target, precision):
            raise UsageError("--verify needs an engine: name it with --out ENGINE, or with --target and --precision")
        folder = out or default_folder(model, target, precision)
        receipt = verify_engine(model, folder, data)
    else:
        wanted = candidates(model, target, precision, detect(), data)
        if data is None or len(wanted) == 1:
            target, precision = wanted[0].target, wanted[0].precision
            folder = out or default_folder(model, target, precision)
            receipt = compile_model(model, target, precision, data, folder, say)
        else:
            folder = out or model / "engines" / AUTO
            tried = compile_fastest(model, wanted, data, folder, say)
            console.print(comparison([candidate.to_dict() for candidate in tried]))
            receipt = tried[0].receipt or {}
    _say_layers(console, receipt)
    size, seconds = receipt["bytes"] / 1e6, receipt["build_seconds"]
    done = "verified" if verify else "wrote"
    console.print(f"{done} {folder}: {size:,.0f} MB, built in {seconds:.0f} s; bertforge.json is its receipt")
    if receipt["verified"]:
        _say_proof(console, receipt)
        console.print(f"next: bertforge predict {folder} TABLE --out predictions.csv")
    else:
        console.print(f"not verified: {receipt['not_verified']}")
        command = compile_command(folder, receipt["target"], receipt["precision"])
        console.print(f"next, where it runs: {command} --verify")


def comparison(tried: list[dict[str, Any]]) -> Table:
    """Every candidate as `Candidate.to_dict` gives it, and why all but the first were not kept."""
    table = Table(box=SIMPLE, pad_edge=False)
    for title in ("engine", "rows/s", "accuracy", "model's", "rows"):
        table.add_column(title, no_wrap=True)
    table.add_column("")
    for place, candidate in enumerate(tried):
        name = f"{candidate['target']} {candidate['precision']}"
        if candidate["why"]:
            table.add_row(name, "-", "-", "-", "-", candidate["why"])
            continue
        name += ", mixed" if candidate["ran"] == "mixed" else ""
        why = "the fastest: kept" if place == 0 else "slower"
        accuracies = (f"{candidate[key]:.2%}" for key in ("accuracy", "accuracy_of_model"))
        table.add_row(name, f"{candidate['questions_per_s']:,.1f}", *accuracies, f"{candidate['rows']:,}", why)
    return table


def _say_layers(console: Terminal, receipt: dict[str, Any]) -> None:
    if (layers := receipt.get("layers")) and layers["gemm_share"]:
        share = ", ".join(f"{part:.1%} in {name}" for name, part in layers["gemm_share"].items())
        fused = f"{layers['fused_attention']} of {layers['softmaxes']}"
        console.print(f"matrix products: {share}; attention fused in {fused} layers")


def _say_proof(console: Terminal, receipt: dict[str, Any]) -> None:
    from bertforge.engines.receipt import verdict
    from bertforge.evaluation.agreement import Agreement
    from bertforge.proof.margin import Margin

    if structure := receipt["structure"]:
        console.print(
            f"structure: with nothing rounded, logits of {structure['probes']} probes are the model's up to "
            f"{structure['largest_difference']:.0e} of their spread"
        )
    else:
        console.print(f"structure: not probed, for {receipt['target']} cannot be opened with nothing rounded")
    console.print(f"golden rows: {Agreement(**receipt['golden_agreement'])}")
    if "validation_agreement" in receipt:
        console.print(f"validation rows: {Agreement(**receipt['validation_agreement'])}")
        console.print(f"accuracy on {receipt['told']}")
        if receipt["precision"] in FORMATS:
            console.print(f"margin: {Margin(**receipt['margin'])}")
    if receipt["spared"]:
        spared = ", ".join(
            f"{unit['component']} of layer {unit['layer']} (moves probabilities by {unit['shift']:.4f})"
            for unit in receipt["spared"]
        )
        console.print(f"spared, for 8 bits cost too much there: {spared}")
    if receipt["products"]:
        console.print(verdict(receipt["products"], receipt["precision"]))


def benchmark(
    model: Annotated[Path, typer.Argument(help="Folder made by `bertforge merge`, or by `train` in full.")],
    data: Annotated[Path, typer.Option(help="Folder made by `bertforge prepare`.")],
    targets: Annotated[
        str, typer.Option(help="all, or targets with commas between them: openvino,pytorch-fp32.")
    ] = "all",
    quantized: Annotated[
        Path | None,
        typer.Option(help="Folder made by `bertforge quantize MODEL`, to build its int8 or fp8 engines from."),
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the data to run: train, validation or test.")] = "validation",
    rows: Annotated[int, typer.Option(min=32, help="Rows to time, spread over the part.")] = 500,
    repeats: Annotated[int, typer.Option(min=1, help="How often to measure each figure.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and its JSON.", show_default="MODEL/benchmark")
    ] = None,
) -> None:
    """Compare engines and precisions by speed, latency, accuracy and memory.

    Engines that were not compiled yet are compiled first, into
    MODEL/engines. Every engine is timed on the same rows, many at a time and
    one at a time, warm and cold. Accuracy is that of the whole part, compared
    with PyTorch in float32 row by row.

    Example:

        bertforge benchmark models/first --data data --targets openvino
    """
    from bertforge.benchmark.run import run_benchmark
    from bertforge.benchmark.table import summary, write
    from bertforge.locks import locked

    console, folder = Terminal(), out or model / "benchmark"
    with locked(folder):
        found = run_benchmark(
            model, data, targets, quantized=quantized, split=split, rows=rows, repeats=repeats, say=console.print
        )
        console.print(summary(found))
        for path in write(folder, found):
            console.print(f"wrote {path}")
