"""`bertforge threshold`, and the options that it shares with `evaluate` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bertforge.terminal import Terminal

Prior = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LABEL=SHARE",
        help="Share of a label where the model is used, such as closed=0.06; corrects the probabilities. Repeatable.",
    ),
]


def by_label(option: str, given: list[str] | None, *, whole: bool = False) -> dict[str, float] | None:
    """`LABEL=NUMBER`, each once; where `whole`, a number alone is of all, under "". None where it was not given."""
    from bertforge.errors import UsageError

    found: dict[str, float] = {}
    for text in given or ():
        label, _, number = text.rpartition("=")
        try:
            value = float(number)
            if not (label or whole):
                raise ValueError
        except ValueError:
            raise UsageError(f"{option} {text!r} is not LABEL=NUMBER, such as {option} closed=0.06") from None
        if label in found:
            raise UsageError(f"{option} names {label or 'all labels'} twice; give one number")
        found[label] = value
    return found or None


def threshold(
    artifact: Annotated[
        Path, typer.Argument(help="Folder made by `bertforge fit`, `train`, `merge`, `quantize` or `compile`.")
    ],
    data: Annotated[Path, typer.Option(help="Folder that the model was trained on; its validation rows choose.")],
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LABEL=]SHARE",
            help="Precision that answers must have: of all answers, or of one label's. Repeatable with labels.",
        ),
    ] = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=COST", help="What a wrong answer of the label costs; 1 if not named. Repeatable."),
    ] = None,
    abstain: Annotated[
        float | None,
        typer.Option(help="What it costs to ask a person, beside --cost. Without it, no row goes to a person."),
    ] = None,
    prior: Prior = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the thresholds as JSON too.")
    ] = None,
) -> None:
    """Choose from which probability on an answer counts, and which rows go to a person.

    Thresholds are chosen on validation rows and kept in the folder's
    bertforge.json. `predict` and the server then give a decision beside each
    label: the label, or "abstain". For a precision, each threshold is the
    last one, from above, down to which the answers are shown, with 95%
    confidence, to have that precision. For costs, it is the cheapest. Choosing again
    replaces the thresholds.

    Examples:

        bertforge threshold runs/first --data data --precision 0.95
        bertforge threshold runs/first --data data --precision closed=0.95
        bertforge threshold runs/first --data data --cost closed=5 \\
            --cost open=1 --abstain 0.5

    Where labels have other shares in use than in the table:

        bertforge threshold runs/first --data data --precision 0.95 \\
            --prior closed=0.06
    """
    from bertforge.artifact import output_files, write_json
    from bertforge.inference.threshold import Wanted, choose_thresholds

    wanted = Wanted(
        by_label("--precision", precision, whole=True), by_label("--cost", cost), abstain, by_label("--prior", prior)
    )
    console = Terminal()
    with output_files(json_file):
        chosen = choose_thresholds(artifact, data, wanted)
        console.print(f"{chosen.folder} on {chosen.source}: {chosen.outcome.rows:,} rows")
        console.print(chosen.outcome.markdown())
        for doubt in chosen.doubts:
            console.print(doubt)
        if json_file:
            console.print(f"wrote {write_json(json_file, chosen.kept)}")
    console.print(f"wrote the thresholds into {chosen.folder / 'bertforge.json'}")
    console.print(f"next: bertforge evaluate {artifact} --data {data}")
