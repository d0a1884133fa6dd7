"""`bertforge prepare`: a table -> a folder of prepared data."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertforge.cli.tables import KINDS, Encoding, Separator, dialect
from bertforge.terminal import Terminal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bertforge.data.prepared import PreparedData


def prepare(
    table: Annotated[
        Path,
        typer.Argument(help=f"{KINDS}.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write; an older prepared one is replaced.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Model whose tokenizer to use: minilm, a folder, or a Hub id.")] = "minilm",
    split: Annotated[
        str,
        typer.Option(
            help="Splits to make: random, time or random,time.", show_default="random, and time if there are dates"
        ),
    ] = "",
    validation: Annotated[
        Path | None,
        typer.Option(help="A file of validation rows; TABLE then holds the train rows.", show_default=False),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="A file of test rows; TABLE then holds the train rows.", show_default=False)
    ] = None,
    split_column: Annotated[
        str,
        typer.Option(
            help="Column that says of each row whether it is for train, validation or test.", show_default=False
        ),
    ] = "",
    folds: Annotated[
        int,
        typer.Option(help="Also make this many splits, fold-1 and so on, for cross-validation.", show_default=False),
    ] = 0,
    text_columns: Annotated[
        str,
        typer.Option(
            help="Columns that are the text of a table of your own, e.g. subject,message.", show_default=False
        ),
    ] = "",
    label_column: Annotated[
        str,
        typer.Option(help="Column to predict in a table of your own; it has two values or more.", show_default=False),
    ] = "",
    date_column: Annotated[
        str, typer.Option(help="Column of dates in a table of your own, for a split by time.", show_default=False)
    ] = "",
    separator: Separator = "",
    encoding: Encoding = "",
    seed: Annotated[int, typer.Option(help="Seed of the random split and the folds.")] = 42,
) -> None:
    """Check a table, derive its columns, split it 80/10/10 and tokenize it.

    Kaggle's table of Stack Overflow questions is recognised by its columns:

        bertforge prepare train-sample.csv --out data

    Of any other table, say which columns to read:

        bertforge prepare mails.csv --out data \\
            --text-columns subject,message --label-column folder

    Rows that can't be used are counted and written to set_aside.jsonl,
    each with its line and the reason. Rows with the same text never stand
    in two parts of a split. Preparing the same table again returns at once.

    If you have test rows of your own, name them, and validation rows alike:

        bertforge prepare train.csv --test test.csv --out data \\
            --text-columns message --label-column folder
    """
    from bertforge.data.prepare import PrepareOptions
    from bertforge.data.prepare import prepare as run
    from bertforge.data.tokens import Tokenizer
    from bertforge.models import resolve

    options = PrepareOptions(
        splits=tuple(_names(split)),
        text_columns=tuple(_names(text_columns)),
        label_column=label_column or None,
        date_column=date_column or None,
        seed=seed,
        encoding=encoding,
        separator=dialect(encoding, separator).separator,
        split_column=split_column or None,
        folds=folds,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, so that nothing half-made stays
    tokenizer = Tokenizer.load(resolve(model))
    data = run(table, out, tokenizer, options, validation=validation, test=test)
    console = Terminal()
    _print_summary(console, data, data.tokens(tokenizer).lengths)
    train = ["bertforge", "train", "--data", str(out), "--out", "run", "--model", model]
    done = f"{out} is up to date" if data.reused else f"wrote {out}"
    console.print(f"\n{done}\nnext: {shlex.join(train)}")


def _names(joined: str) -> list[str]:
    return [name.strip() for name in joined.split(",") if name.strip()]


def _print_summary(console: Terminal, data: PreparedData, lengths: NDArray[np.int64]) -> None:
    import numpy as np
    from rich.text import Text

    from bertforge.data.clean import UNPARSABLE_DATE
    from bertforge.data.concerns import concerns
    from bertforge.data.prepared import GIVEN, SET_ASIDE_FILE
    from bertforge.data.rows import DATE_FORMATS
    from bertforge.data.tokens import MAX_TOKENS

    facts = data.manifest
    set_aside = sum(reason["rows"] for reason in facts["set_aside"].values())
    if data.made_up:
        console.print("made-up data: the rows come from `bertforge sample-data` and say nothing about Stack Overflow")
    console.print(
        f"{facts['rows']:,} rows kept, {set_aside:,} set aside" + (f" (see {SET_ASIDE_FILE})" if set_aside else "")
    )
    for reason, seen in sorted(facts["set_aside"].items(), key=lambda item: -item[1]["rows"]):
        more = ", ..." if seen["rows"] > len(seen["lines"]) else ""
        console.print(f"  {seen['rows']:,} {reason}: line {', '.join(map(str, seen['lines']))}{more}")
    if any(reason.startswith(UNPARSABLE_DATE) for reason in facts["set_aside"]):
        console.print(f"dates are read as {DATE_FORMATS}")
    shares = [f"{name} {count:,} ({count / facts['rows']:.1%})" for name, count in facts["label_counts"].items()]
    shown = ", ".join(shares[:8]) + (f", and {len(shares) - 8} more" if len(shares) > 8 else "")
    console.print(f"labels: {shown}")
    duplicates = facts["duplicates"]
    console.print(
        f"duplicates: {duplicates['rows']:,} rows repeat an earlier text and stay in its split; "
        f"{duplicates['conflicting_texts']:,} texts carry more than one label"
    )
    for name, sizes in facts["splits"].items():
        if name == GIVEN:
            _print_given(console, facts["given"])
        console.print(f"split {name}: " + ", ".join(f"{part} {count:,}" for part, count in sizes.items()))
    at_limit = float(np.mean(lengths == MAX_TOKENS))
    console.print(
        f"tokens: median {np.median(lengths):.0f} a row, mean {lengths.mean():.0f}, "
        f"{at_limit:.1%} of the rows at the limit of {MAX_TOKENS}"
    )
    for concern in concerns(data):
        console.print(Text(f"WARNING: {concern}", style="bold yellow"))


def _print_given(console: Terminal, given: dict[str, Any]) -> None:
    repeated = {part: rows for part, rows in given["repeated"].items() if rows}
    if repeated:
        rows = " and ".join(f"{count:,} {part}" for part, count in repeated.items())
        console.print(
            f"{rows} rows repeat a text of a later part (validation or test); the split given leaves them out, so that "
            "the later part stays whole"
        )
    for part in given["drawn"]:
        console.print(f"no {part} rows were given: a tenth of the train rows were drawn for them")
