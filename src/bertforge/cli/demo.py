"""`bertforge demo`: the main job from end to end, on made-up questions and the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROWS = 5000
MARKER = ".bertforge-demo"  # what a folder holds that an earlier demo made
_FOLDERS, _FILES = ("data", "run", "model"), ("questions.csv", "report.html", "new-questions.csv", "predictions.csv")


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder to write everything into; an earlier demo in it is replaced.")
    ] = Path("demo-run"),
) -> None:
    """Run the main job: make up questions, prepare, fine-tune with LoRA, evaluate, merge, compile, compare, predict.

    Takes a few minutes on two CPU cores and needs no download: the model comes with the `demo` extra, and the
    questions are made up, so the figures say how bertforge works and nothing about Stack Overflow.
    """
    from bertforge.benchmark.run import run_benchmark
    from bertforge.benchmark.table import summary, write
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
    from bertforge.models import resolve
    from bertforge.training.config import load_recipe

    console = Console(highlight=False, soft_wrap=True)
    _start_afresh(out)
    table = out / "questions.csv"

    console.rule(f"1 of 7: {ROWS:,} made-up questions")
    write_sample(table, sample_rows(ROWS, seed=42))
    console.print(f"wrote {table}")
    console.rule("2 of 7: check, split and tokenize")
    prepared = prepare(table, out / "data", Tokenizer.load(resolve("minilm")))
    console.print(f"wrote {out / 'data'}: {len(prepared):,} rows")
    console.rule("3 of 7: fine-tune MiniLM with LoRA")
    recipe = load_recipe("lora-r8-all").with_settings(["model=minilm", "epochs=2", "tokens_per_step=2048"])
    manifest = run(out / "data", out / "run", recipe)
    print_result(console, manifest, out / "run")
    console.rule("4 of 7: evaluate on the test split")
    evaluation = evaluate_run(out / "run", out / "data", "test")
    console.print(metrics_markdown(evaluation.metrics), markup=False)
    console.rule("5 of 7: merge the adapter into a plain Hugging Face model")
    measured = merge_run(out / "run", out / "model")
    console.print(f"wrote {out / 'model'}: largest logit difference {measured['max_logit_difference']:.2g}")
    console.rule("6 of 7: compile for this CPU, and compare engines on validation rows")
    found = run_benchmark(
        out / "model",
        out / "data",
        "openvino-bf16,openvino-int8",
        split="validation",
        rows=48,
        repeats=2,
        say=console.print,
    )
    write(out / "model" / "benchmark", found)
    console.print(summary(found))
    report = evaluation.write_report(out / "report.html", found["rows"])
    fastest = max(found["rows"], key=lambda row: row.get("questions_per_s", 0.0))
    is_ours = fastest["framework"] == "pytorch"
    engine = out / "model" if is_ours else default_folder(out / "model", fastest["framework"], fastest["precision"])
    console.rule(f"7 of 7: predict with the fastest, {fastest['framework']} {fastest['precision']}")
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
    console.print("  bertforge benchmark models/first --data data --targets pytorch,openvino")


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
