"""`bertforge evaluate`, `predict` and `merge`: what is done with a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bertforge.cli.tables import KINDS, Encoding, Separator, dialect
from bertforge.cli.threshold import Prior, by_label
from bertforge.terminal import Terminal

_MADE_UP = (
    "made-up data: these rows, or the train rows, come from `bertforge sample-data`: no figure is about real data"
)

RunFolder = Annotated[
    Path, typer.Argument(help="Folder made by `bertforge fit`, `train`, `merge`, `quantize` or `compile`.")
]

Recheck = Annotated[
    Path | None,
    typer.Option(help="For an engine in 8 bits: its model, or another engine of that, which answers close rows again."),
]


def evaluate(
    run: RunFolder,
    data: Annotated[Path, typer.Option(help="Folder made by `bertforge prepare`, or a table with labels.")],
    split: Annotated[
        str | None, typer.Option(help="Part of the prepared data: train, validation or test.", show_default="test")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Another run, model or engine to compare with, on the same rows, by a paired test."),
    ] = None,
    recheck: Recheck = None,
    prior: Prior = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML report to write.", show_default="RUN/report-SPLIT.html")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the metrics as JSON too.")
    ] = None,
    separator: Separator = "",
    encoding: Encoding = "",
) -> None:
    """Measure a run: loss, accuracy, precision, recall, F1, ROC-AUC, calibration, each with a 95% interval.

    Writes a self-contained HTML report. For prepared data it writes beside it
    the mistakes that the model was surest of, texts included: `bertforge
    serve` shows them to anyone who may use it, beside similar texts. Rows of
    another table stay out of that file. Choose settings by the validation rows;
    read the test rows once, for the final figures. With --prior, rows of
    labels that are too many are left out, until the others have the shares
    that you name.

    Example:

        bertforge evaluate runs/first --data data --against runs/second
    """
    from bertforge.artifact import output_files, write_json
    from bertforge.errors import MachineError
    from bertforge.evaluation.mistakes import mistakes_beside
    from bertforge.evaluation.report import metrics_markdown
    from bertforge.inference.evaluate import evaluate_run
    from bertforge.manifest import MANIFEST

    console = Terminal()
    prepared = (data / MANIFEST).is_file()
    scored = split or "test" if prepared else f"table-{data.stem}"
    written = report or run / f"report-{scored}.html"
    mistakes = mistakes_beside(written) if prepared else None  # a table may be anybody's, and mistakes are shown to all
    with output_files(*((written, mistakes) if run.is_dir() else (report,)), json_file):
        shares = by_label("--prior", prior)
        found = evaluate_run(run, data, split, against, dialect(encoding, separator), recheck=recheck, prior=shares)
        console.print(f"{run} on {found.scored.source}: {len(found.scored.labels):,} rows")
        if found.scored.made_up:
            console.print(_MADE_UP)
        if found.scored.left_out:
            console.print(f"left out {found.scored.left_out:,} rows without a text and a known label")
        if found.recheck:
            console.print(str(found.recheck))
        console.print(metrics_markdown(found.metrics))
        console.print(found.calibration)
        if found.decisions:
            console.print(f"\n{found.decisions.markdown()}")
        if found.standing:
            console.print(f"\n{found.standing.markdown()}")
        if found.comparison:
            console.print(found.comparison.verdict)
        if json_file:
            console.print(f"wrote {write_json(json_file, found.to_dict())}")
        if mistakes:
            console.print(f"wrote {found.write_mistakes(written)}")
        try:
            console.print(f"wrote {found.write_report(written)}")
        except MachineError as error:
            if report:
                raise
            console.print(f"no report written: {error}")


def predict(
    run: RunFolder,
    table: Annotated[Path, typer.Argument(help=f"{KINDS}; labels are not needed.")],
    out: Annotated[Path, typer.Option(help="File to write: .csv, .parquet or .jsonl.")],
    recheck: Recheck = None,
    prior: Prior = None,
    safe_csv: Annotated[
        bool,
        typer.Option(
            "--safe-csv", help="For a .csv to open in a spreadsheet: ' before labels that it would take for formulas."
        ),
    ] = False,
    separator: Separator = "",
    encoding: Encoding = "",
) -> None:
    """Predict the label of every row of a table.

    The output has a row for each row of the table, in its order: line, label,
    probability, the probability of each label, the decision where `bertforge
    threshold` chose thresholds, and what was wrong with the row. A row
    without text has no label. Labels are as the training table
    had them, also those that start with =, +, - or @; see --safe-csv.

    Example:

        bertforge predict runs/first questions.csv --out predictions.csv

    An engine in 8 bits gives some rows another label than its model does:
    rows where two labels are close. To ask those again, of the model:

        bertforge predict models/first/engines/auto questions.csv \\
            --out predictions.csv --recheck models/first
    """
    from bertforge.inference.predict import predict_table
    from bertforge.inference.predictor import Predictor

    predictor = Predictor.load(run, recheck=recheck, prior=by_label("--prior", prior))
    done = predict_table(predictor, table, out, dialect(encoding, separator), safe_csv=safe_csv)
    console = Terminal()
    if done.made_up:
        console.print(_MADE_UP)
    if done.unlabelled:
        console.print(f"{done.unlabelled:,} rows have no readable text and so no label; see the column `problem`")
    if done.abstained is not None:
        console.print(f"{done.abstained:,} rows go to a person: their decision is `abstain`")
    if predictor.recheck:
        console.print(str(predictor.recheck))
    console.print(f"wrote {out}: {done.rows:,} rows")


def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a LoRA run, made by `bertforge train`.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; made here.")],
) -> None:
    """Merge a LoRA run into a plain Hugging Face folder, and measure what that changes.

    transformers loads the result of a model that reads text alone:
    pipeline("text-classification", model=DIR, truncation=True) gives the
    same labels. Its scores are those before the temperature.

    Example:

        bertforge merge runs/first --out models/first
    """
    from bertforge.jobs.merge import merge_run

    measured = merge_run(run, out)
    console = Terminal()
    console.print(
        f"on {measured['rows']} validation rows the merge changed logits by {measured['max_logit_difference']:.2g} "
        f"at most, and {measured['changed_labels']} labels"
    )
    console.print(f"wrote {out}")
    console.print(f"next: bertforge predict {out} TABLE --out predictions.csv")
