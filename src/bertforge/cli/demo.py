"""`bertforge demo`: the main job from end to end, on made-up questions and the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROWS = 5000
MARKER = ".bertforge-demo"  # what a folder holds that an earlier demo made
_FOLDERS, _FILES = (
    ("data", "run", "model", "int8"),
    ("questions.csv", "report.html", "new-questions.csv", "predictions.csv"),
)


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder to write everything into; an earlier demo in it is replaced.")
    ] = Path("demo-run"),
) -> None:
    """Run the main job: prepare made-up questions, fine-tune with LoRA, evaluate, merge, quantize, compile, predict.

    Takes a few minutes on two CPU cores and needs no download: the model comes with the `demo` extra, and the
    questions are made up, so the figures say how bertforge works and nothing about Stack Overflow.
    """
    from bertforge.benchmark.run import run_benchmark
    from bertforge.benchmark.table import summary, write
    from bertforge.cli.quantize import print_quantization, telling
    from bertforge.cli.train import print_result, run
    from bertforge.data.prepare import prepare
    from bertforge.data.sample import sample_rows, write_sample
    from bertforge.data.tokens import Tokenizer
    from bertforge.evaluation.report import metrics_markdown
    from bertforge.inference.compile import default_folder
    from bertforge.inference.evaluate import evaluate_run
    from bertforge.inference.merge import merge_run
    from bertforge.inference.predict import predict_table
    from bertforge.inference.predictor import Predictor
    from bertforge.inference.quantize import QuantizeOptions, quantize_model
    from bertforge.models import resolve
    from bertforge.training.config import load_recipe

    console = Console(highlight=False, soft_wrap=True)
    _start_afresh(out)
    table = out / "questions.csv"

    console.rule(f"1 of 8: {ROWS:,} made-up questions")
    write_sample(table, sample_rows(ROWS, seed=42))
    console.print(f"wrote {table}")
    console.rule("2 of 8: check, split and tokenize")
    prepared = prepare(table, out / "data", Tokenizer.load(resolve("minilm")))
    console.print(f"wrote {out / 'data'}: {len(prepared):,} rows")
    console.rule("3 of 8: fine-tune MiniLM with LoRA")
    recipe = load_recipe("lora-r8-all").with_settings(["model=minilm", "epochs=2", "tokens_per_step=2048"])
    manifest = run(out / "data", out / "run", recipe)
    print_result(console, manifest, out / "run")
    console.rule("4 of 8: evaluate on the test split")
    evaluation = evaluate_run(out / "run", out / "data", "test")
    console.print(metrics_markdown(evaluation.metrics), markup=False)
    console.rule("5 of 8: merge the adapter into a plain Hugging Face model")
    measured = merge_run(out / "run", out / "model")
    console.print(f"wrote {out / 'model'}: largest logit difference {measured['max_logit_difference']:.2g}")
    console.rule("6 of 8: quantize to 8 bits, and see what each layer loses")
    options = QuantizeOptions(calibration="percentile", rows=64, validation_rows=128)
    with telling() as say:
        quantized = quantize_model(out / "model", out / "data", out / "int8", options, None, say)
    print_quantization(console, quantized)
    console.print(f"wrote {out / 'int8'}")
    console.rule("7 of 8: compile for this CPU, and compare engines on validation rows")
    found = run_benchmark(
        out / "model",
        out / "data",
        "openvino-bf16,openvino-int8",
        quantized=out / "int8",
        split="validation",
        rows=48,
        repeats=2,
        say=console.print,
    )
    write(out / "model" / "benchmark", found)
    console.print(summary(found))
    report = evaluation.write_report(out / "report.html", found["rows"], quantized)
    fastest = max(found["rows"], key=lambda row: row.get("questions_per_s", 0.0))
    source = out / ("int8" if fastest["precision"] == "int8" else "model")
    is_ours = fastest["framework"] == "pytorch"
    engine = source if is_ours else default_folder(source, fastest["framework"], fastest["precision"])
    console.rule(f"8 of 8: predict with the fastest, {fastest['framework']} {fastest['precision']}")
    questions = out / "new-questions.csv"
    write_sample(questions, sample_rows(20, seed=7))
    predictions = out / "predictions.csv"
    done = predict_table(Predictor.load(engine), questions, predictions)
    console.print(f"wrote {predictions}: {done.rows} rows")
    console.rule()
    console.print(f"the report: {report}")
    console.print("next, with a table of your own:")
    console.print("  bertforge prepare TABLE.csv --out data --text-columns subject,message --label-column folder")
    console.print("  bertforge train --data data --out runs/first --variant lora-r8 --model minilm")
    console.print("  bertforge evaluate runs/first --data data")
    console.print("  bertforge merge runs/first --out models/first")
    console.print("  bertforge quantize models/first --data data --out models/first-int8")
    console.print("  bertforge compile models/first-int8 --data data")


def _start_afresh(out: Path) -> None:
    """Makes `out`, or removes from it what an earlier demo made, and nothing else; raises ArtifactError for others."""
    import shutil

    from bertforge.errors import ArtifactError

    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; name a folder with --out")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ArtifactError(f"{out} holds something that is no demo; name another folder with --out")
    for name in _FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
