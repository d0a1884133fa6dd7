"""`bertforge sample-data`: a table of made-up questions, for trying everything else without a download."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from bertforge.terminal import Terminal


def sample_data(
    out: Annotated[Path, typer.Argument(help="The table to write: .csv or .parquet.", show_default=False)],
    rows: Annotated[int, typer.Option(help="How many questions.")] = 5000,
    seed: Annotated[int, typer.Option(help="Another seed makes other questions.")] = 42,
) -> None:
    """Write made-up questions in the schema of Kaggle's "predict closed questions on Stack Overflow".

    Nobody asked these questions: they are composed from a grammar, with 8% of the labels wrong on purpose, so figures
    measured on them say how bertforge works and nothing about Stack Overflow. A larger table of the same seed begins
    with the rows of a smaller one.
    """
    from bertforge.data.sample import MADE_UP_FIRST_POST_ID, sample_rows, write_sample

    stderr = Terminal(stderr=True)
    write_sample(out, track(sample_rows(rows, seed), "making up questions", rows, console=stderr, transient=True))
    console = Terminal()
    console.print(
        f"wrote {out}: {rows:,} made-up questions, seed {seed} (PostId from {MADE_UP_FIRST_POST_ID} marks them)\n"
        f"next: {shlex.join(['bertforge', 'prepare', str(out), '--out', 'data'])}"
    )
