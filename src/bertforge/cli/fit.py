"""`bertforge fit`: a table in, the best model and its fastest proved engine out."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from bertforge.cli.tables import KINDS, Encoding, Separator, dialect
from bertforge.terminal import Terminal

if TYPE_CHECKING:
    from bertforge.autofit.fit import FitOptions
    from bertforge.training.config import Recipe


def fit(
    table: Annotated[
        Path,
        typer.Argument(help=f"{KINDS}.", show_default=False),
    ],
    label_column: Annotated[
        str | None,
        typer.Option(help="The column to predict.", show_default="OpenStatus of the Stack Overflow questions table"),
    ] = None,
    text_columns: Annotated[
        str, typer.Option(help="The columns that are the text, e.g. subject,message.", show_default="found by content")
    ] = "",
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder to write; the same command goes on in it.")] = Path("model"),
    model: Annotated[str, typer.Option(help="Pretrained model: minilm, a folder or a Hub id.")] = "minilm",
    separator: Separator = "",
    encoding: Encoding = "",
    seed: Annotated[int, typer.Option(help="Of the split, the trials and the training.")] = 42,
) -> None:
    """Find the best model for a table, train it and compile its fastest engine.

    Reads the table, chooses columns and settings by short trials on
    validation rows, trains, evaluates once on test rows, and keeps the
    fastest engine that proves itself. Columns that give the label away are
    left out, and told. Ctrl-C is safe: the same command goes on.

    Example:

        bertforge fit mails.csv --label-column folder --minutes 10

    OUT can then be used like any model: bertforge predict OUT TABLE.
    """
    from bertforge.autofit.fit import FitOptions

    names = tuple(name.strip() for name in text_columns.split(",") if name.strip())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, so that nothing half-made stays
    told = dialect(encoding, separator)
    show_fit(table, out, FitOptions(label_column, names, minutes, model, seed, told.encoding, told.separator))
    show_next(out)


def show_fit(table: Path, out: Path, options: FitOptions) -> None:
    """Runs the fit, shows each stage, and what came out of it."""
    from bertforge.autofit.fit import STATE, fit_table
    from bertforge.cli.engines import comparison
    from bertforge.cli.train import run as train
    from bertforge.evaluation.metrics import Metrics
    from bertforge.evaluation.report import metrics_markdown
    from bertforge.evaluation.standing import Standing

    console = Terminal()
    again = "the same command goes on"

    def shown(data: Path, folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any]:
        return train(data, folder, recipe, resume=resume, again=again)

    try:
        done = fit_table(table, out, options, say=console.print, train=shown)
    except KeyboardInterrupt:
        if (out / STATE).is_file():
            console.print(again)
        raise
    console.print(_trials(done["trials"]))
    console.print(metrics_markdown(Metrics.from_dict(done["metrics"])))
    if done["baselines"]:
        console.print(f"\n{Standing.from_dict(done['baselines']).markdown()}")
    console.print(done["calibration"])
    if done["engines"]:
        console.print(comparison(done["engines"]))
    report = out / "report.html"
    console.print(f"wrote {out} in {done['seconds'] / 60:.1f} minutes" + f"; the report: {report}" * report.is_file())


def show_next(out: Path) -> None:
    """What to type to use a fit."""
    console = Terminal()
    program = f'from bertforge import Predictor; print(Predictor.load({json.dumps(str(out))}).predict(["..."]))'
    console.print("next:")
    console.print(f"  {shlex.join(['bertforge', 'predict', str(out), 'TABLE', '--out', 'predictions.csv'])}")
    console.print(f"  {shlex.join(['python', '-c', program])}")


def _trials(trials: list[dict[str, Any]]) -> Table:
    table = Table(title="trials on validation rows", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("settings", no_wrap=True)
    for title in ("rows seen", "loss", "accuracy", "seconds"):
        table.add_column(title, justify="right")
    for trial in trials:
        figures = f"{trial['rows_seen']:,}", f"{trial['loss']:.4f}", f"{trial['accuracy']:.2%}"
        table.add_row(trial["name"], *figures, f"{trial['seconds']:.0f}")
    return table
