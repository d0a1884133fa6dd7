"""`bertforge demo`: `fit` on made-up questions and the bundled model, then predictions of new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bertforge.terminal import Terminal

ROWS, NEW_ROWS = 2000, 20
MINUTES = 4.0
MARKER = ".bertforge-demo"  # what a folder holds that an earlier demo made


def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder to write everything into; an earlier demo in it is replaced, an interrupted one goes on."
        ),
    ] = Path("demo-run"),
) -> None:
    """Run `fit` on made-up questions, from the table to the fastest engine, and predict new ones.

    Takes about four minutes on two CPU cores and needs no download: the
    model comes with the `demo` extra. The questions are made up, so the
    figures say how bertforge works and nothing about Stack Overflow.
    """
    from bertforge.locks import locked

    console = Terminal()
    with locked(out):
        _run(out, console)
    console.print("next, with a table of your own:")
    console.print("  bertforge fit TABLE.csv --label-column folder --out model")
    console.print("  bertforge predict model NEW.csv --out predictions.csv")


def _run(out: Path, console: Terminal) -> None:
    from bertforge.autofit.fit import FitOptions
    from bertforge.cli.fit import show_fit
    from bertforge.data.sample import sample_rows, write_sample
    from bertforge.inference.predict import predict_table
    from bertforge.inference.predictor import Predictor

    _start(out)
    table, model = out / "questions.csv", out / "model"
    console.print(
        f"writing {ROWS:,} made-up questions, then: bertforge fit {table} --minutes {MINUTES:g} --out {model}"
    )
    write_sample(table, sample_rows(ROWS, seed=42))
    show_fit(table, model, FitOptions(minutes=MINUTES))
    questions = write_sample(out / "new-questions.csv", sample_rows(NEW_ROWS, seed=7))
    done = predict_table(Predictor.load(model), questions, out / "predictions.csv")
    console.print(f"predicted {done.rows} new questions: {out / 'predictions.csv'}")


def _start(out: Path) -> None:
    """Makes `out`, or removes the finished fit of an earlier demo; raises ArtifactError for any other folder."""
    import shutil

    from bertforge.errors import ArtifactError
    from bertforge.locks import holds_something
    from bertforge.manifest import MANIFEST

    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; name a folder with --out")
    if holds_something(out) and not (out / MARKER).is_file():
        raise ArtifactError(f"{out} holds something that is no demo; name another folder with --out")
    if (out / "model" / MANIFEST).is_file():
        shutil.rmtree(out / "model")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
