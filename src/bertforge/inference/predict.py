"""A raw table in, a file of predictions out: every row, in order, streamed.

Reading, checking, tokenizing, the engine and writing run beside one another, each in threads, for nearly all of it is
work without the interpreter lock. A stage is at most a chunk or two ahead of the next, so memory does not grow with the
table, and its errors come up here.

Labels are written as the training table gave them, so that programs find them again. But a spreadsheet runs a cell that
starts with `=`, `+`, `-` or `@` as a formula, and whoever wrote the table may have meant that. `safe_csv` is for files
to be opened there, and does what OWASP advises (https://owasp.org/www-community/attacks/CSV_Injection): an apostrophe
before such a cell, and quotes around every text cell, so that no other separator splits one.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bertforge.artifact import naming, output_files
from bertforge.data.dialect import Dialect
from bertforge.data.raw import RawRows, read_raw
from bertforge.data.streaming import ahead, progress
from bertforge.errors import DataError, UsageError
from bertforge.evaluation.decisions import ABSTAIN
from bertforge.inference.predictor import Predictor
from bertforge.locks import new_file

FORMATS = (".csv", ".parquet", ".jsonl")
_TEXTS = ["label", "decision", "problem"]  # columns
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # OWASP's list; East Asian versions take the wide signs for the same


class Predicted(NamedTuple):
    """What `predict_table` wrote."""

    rows: int
    unlabelled: int
    """Rows without readable text, and so without a label."""
    made_up: bool
    """Rows of the table, or rows the model learnt from, come from `bertforge sample-data`."""
    abstained: int | None
    """Rows that go to a person; None where no thresholds were chosen."""


def predict_table(
    predictor: Predictor, table: Path, out: Path, dialect: Dialect | None = None, *, safe_csv: bool = False
) -> Predicted:
    """Writes line, label, probability, each label's probability, decision (where thresholds were chosen) and problem.

    `dialect` is what is known of how a text table is written; the rest is detected. `safe_csv` makes text cells of a
    CSV safe for a spreadsheet.

    A row whose date or number cannot be read is predicted without it and says so under `problem`; only one with no
    readable text at all has no label. Raises UsageError for an `out` that is not one of FORMATS, is the table itself or
    is no CSV where `safe_csv` is asked for, and leaves nothing half-written.
    """
    if out.exists() and table.exists() and out.samefile(table):
        raise UsageError(f"--out {out} is the table itself, which would be overwritten; name another file")
    if safe_csv and out.suffix != ".csv":
        raise UsageError(f"--safe-csv is for .csv files, and --out is {out}; leave it out")
    rows, unlabelled, abstained, made_up = 0, 0, 0, False
    decides = predictor.codec.policy is not None
    with (
        _writer(out, safe_csv) as write,
        progress(f"predicting {table.name}") as report,
        closing(ahead(_read(predictor, table, dialect))) as chunks,
        closing(predictor.predict_each((chunk, chunk.texts, chunk.frame) for chunk in chunks)) as predicted,
    ):
        for chunk, predictions in predicted:
            write(_rows(predictor, chunk, predictions))
            rows += len(predictions)
            unlabelled += int(predictions["label"].isna().sum())
            abstained += int((predictions["decision"] == ABSTAIN).sum()) if decides else 0
            made_up = made_up or predictor.made_up(chunk.frame)
            report(rows, chunk.done)
        if rows == 0:
            raise DataError(f"{table} holds no rows to predict")
    return Predicted(rows, unlabelled, made_up, abstained if decides else None)


def _read(predictor: Predictor, table: Path, dialect: Dialect | None) -> Iterator[RawRows]:
    """The table's rows, with the columns that the model reads."""
    spec = None if predictor.transform is None else predictor.transform.spec
    numbers, derived = (spec.holding("number"), spec.columns) if spec else ((), ())
    chunks = read_raw(table, predictor.schema, require_labels=False, numbers=numbers, derived=derived, dialect=dialect)
    return (chunk for chunk in chunks if chunk.texts)  # a table of a header alone is one chunk without rows


def _rows(predictor: Predictor, chunk: RawRows, predicted: pd.DataFrame) -> pd.DataFrame:
    """What is written of a chunk."""
    written = dict(zip(predictor.schema.original_labels(), predictor.label_names, strict=True))
    predicted["label"] = predicted["label"].map(written)
    if "decision" in predicted:
        predicted["decision"] = predicted["decision"].map({**written, ABSTAIN: ABSTAIN})
    predicted.insert(0, "line", chunk.lines)
    predicted["problem"] = chunk.problems
    return predicted


@contextmanager
def _writer(out: Path, safe_csv: bool) -> Iterator[Callable[[pd.DataFrame], None]]:
    """A function that appends frames to a file that becomes `out` when the block ends well."""
    if out.suffix not in FORMATS:
        raise UsageError(f"--out {out} should end in {', '.join(FORMATS)}")
    with output_files(out), naming(out), new_file(out) as file:
        parquet: pq.ParquetWriter | None = None

        def write(frame: pd.DataFrame) -> None:
            nonlocal parquet
            if out.suffix == ".parquet":
                table = pa.Table.from_pandas(frame, preserve_index=False, schema=_parquet_schema(frame))
                parquet = parquet or pq.ParquetWriter(file, table.schema)
                parquet.write_table(table)
            elif out.suffix == ".csv":
                for name in frame.columns.intersection(_TEXTS) if safe_csv else ():
                    frame[name] = frame[name].map(_harmless)
                quoting: Any = csv.QUOTE_NONNUMERIC if safe_csv else csv.QUOTE_MINIMAL
                file.write(frame.to_csv(index=False, header=not file.tell(), quoting=quoting).encode())
            else:
                for row in frame.to_dict("records"):
                    clean = {str(name): None if value != value else value for name, value in row.items()}  # NaN
                    file.write(f"{json.dumps(clean)}\n".encode())

        try:
            yield write
        finally:  # while the file is open: it would else be closed later, with a complaint
            if parquet is not None:
                parquet.close()


def _harmless(cell: object) -> object:
    """A label or a problem for a spreadsheet; NaN as it is."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def _parquet_schema(frame: pd.DataFrame) -> pa.Schema:
    """The same types for every chunk, whether or not a row of it lacks a label."""
    kinds = {"line": pa.int64(), **dict.fromkeys(_TEXTS, pa.string())}
    return pa.schema([(name, kinds.get(name, pa.float32())) for name in frame.columns])
