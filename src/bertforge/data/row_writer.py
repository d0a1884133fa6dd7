"""Where the rows of `prepare` go: good ones to `table.parquet`, the others, with the reason, to `set_aside.jsonl`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertforge.data import limits
from bertforge.data.chunks import STRING, BadRow, Chunk, is_text
from bertforge.data.clean import UNPARSABLE_DATE, find_problems
from bertforge.data.features import derive, named_as_derived
from bertforge.data.prepared import SET_ASIDE_FILE, TABLE_FILE, join_texts
from bertforge.data.rows import DATE_FORMATS, Rows
from bertforge.data.sample import is_made_up
from bertforge.data.schema import MAX_LABELS, QUESTIONS, TEXT, Schema, kind_of_labels, sort_labels, spell_labels
from bertforge.data.splits import hash_texts, parts_named
from bertforge.errors import DataError

_FEW_LABELS = 10  # a tiny table may have half as many labels as rows
_MANY_LABELS = 10 * MAX_LABELS  # of rows set aside that are counted
_LINES_SHOWN = 5  # line numbers kept per reason in the manifest; set_aside.jsonl has them all


@dataclass(frozen=True)
class KeptRows:
    """What the splits need to know of the good rows, [rows] each."""

    labels: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    dates: NDArray[np.datetime64]
    """Empty when there is no date column."""
    given: NDArray[np.int8]
    """The part of a split that the user put the row into; 0, train, where he said nothing."""


class RowWriter:
    """Takes chunks one by one; memory holds a line, a label, a date and a hash per row."""

    def __init__(self, folder: Path, schema: Schema, split_column: str | None = None) -> None:
        self.schema = schema
        self._split_column = split_column
        self._folder = folder
        self._parquet: pq.ParquetWriter | None = None
        self._set_aside = (folder / SET_ASIDE_FILE).open("w", encoding="utf-8")
        self._reasons: dict[str, dict[str, Any]] = {}
        self._codes = {name: code for code, name in enumerate(schema.label_names)}  # in order of appearance
        self._labels_are_text = bool(schema.label_names)  # those of Stack Overflow
        self._made_up = False
        self._lines: list[NDArray[np.int64]] = []
        self._labels: list[NDArray[np.int64]] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._dates: list[NDArray[np.datetime64]] = []
        self._given: list[NDArray[np.int8]] = []
        self._aside: Counter[str] = Counter()  # labels of rows set aside, as far as they can be read

    def take(self, chunk: Chunk, part: int = 0, file: str = "") -> list[str]:
        """Writes a chunk and returns the texts of its good rows.

        `part` is that of a split, and `file` the name, of rows that came in a file of their own. Raises DataError when
        a column of the table has the name of a derived one, or the split column holds no part's name.
        """
        rows = Rows(chunk.table)
        if clash := named_as_derived(rows.names, self.schema):
            raise DataError(f"bertforge derives columns of the names {', '.join(clash)}; rename those of the table")
        problems = find_problems(rows, self.schema, labelled=True)
        good = problems == ""
        keep = pa.array(good)
        derived = derive(rows, self.schema)
        table = pa.table(
            [*chunk.table.columns, *derived.columns], names=[*chunk.table.column_names, *derived.column_names]
        )
        table = table.filter(keep)
        self._write(table)
        for bad in sorted([*chunk.bad, *_problem_rows(chunk, problems)], key=lambda row: row.line):
            self._put_aside(bad, file)
        self._count_aside(self._labels_of_bad(chunk.bad))
        self._count_aside(self.schema.label_values(rows).filter(pa.array(~good)).to_pylist())
        if set(QUESTIONS.required_columns) <= set(rows.names):  # in any other table a PostId is something else
            self._made_up |= is_made_up(chunk.table.select(["PostId"] if "PostId" in rows.names else []).to_pandas())
        texts = join_texts(table, self.schema)
        self._labels_are_text |= self.schema.label_column in chunk.declared_text
        self._lines.append(chunk.line[good])
        self._labels.append(self._encode(self.schema.label_values(rows).filter(keep)))
        self._hashes.append(hash_texts(texts))
        if self._split_column:
            self._given.append(parts_named(rows.text(self._split_column).filter(keep).to_pylist(), self._split_column))
        else:
            self._given.append(np.full(len(texts), part, dtype=np.int8))
        if self.schema.date_column:
            self._dates.append(rows.date(self.schema.date_column)[good])
        return texts

    def finish(self) -> tuple[KeptRows, dict[str, Any]]:
        """Writes the arrays; returns what the splits need, and what the manifest says.

        Raises DataError when no row is good, or the labels cannot be learnt from.
        """
        self._set_aside.close()
        assert self._parquet is not None, "finish() before the first chunk"
        columns = {field.name: str(field.type).removeprefix("large_") for field in self._parquet.schema}
        labels = np.concatenate(self._labels)
        if not len(labels):
            raise DataError("no row of the table is good: " + (self._describe_reasons() or "it holds only a header"))
        kind = TEXT if self._labels_are_text else kind_of_labels(self._codes)
        spelled = spell_labels(pa.array(self._codes, STRING), kind).to_pylist()
        names = self.schema.label_names or sort_labels(set(spelled))
        if 2 * len(names) > len(labels) and len(names) > _FEW_LABELS:
            raise DataError(
                f"column {self.schema.label_column} holds {len(names):,} different values in {len(labels):,} rows, "
                "so it is no column of classes; name another with --label-column"
            )
        labels = np.array([names.index(name) for name in spelled])[labels]
        counts = np.bincount(labels, minlength=len(names))
        if np.count_nonzero(counts) < 2:
            only = names[int(labels[0])]
            raise DataError(
                f"all {len(labels)} good rows have the label {only!r}; a classifier needs two labels or more"
            )
        seen = spell_labels(pa.array(self._aside, STRING), kind).to_pylist()
        aside = [sum(self._aside[raw] for raw, name in zip(self._aside, seen, strict=True) if name == n) for n in names]
        np.save(self._folder / "labels.npy", labels)
        np.save(self._folder / "lines.npy", np.concatenate(self._lines))
        dates = np.concatenate(self._dates) if self._dates else np.array([], dtype="datetime64[s]")
        if self._dates:
            np.save(self._folder / "dates.npy", dates)
        facts = {
            "schema": replace(self.schema, label_names=names, label_kind=kind).to_dict(),
            "rows": len(labels),
            "label_counts": dict(zip(names, counts.tolist(), strict=True)),
            "set_aside": self._reasons,
            "set_aside_labels": {name: count for name, count in zip(names, aside, strict=True) if count},
            "made_up": self._made_up,
            "columns": columns,
        }
        return KeptRows(labels, np.concatenate(self._hashes), dates, np.concatenate(self._given)), facts

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._parquet:
            self._parquet.close()
        self._set_aside.close()

    def _write(self, table: pa.Table) -> None:
        if self._parquet is None:
            texts = set(self.schema.text_columns)  # no two alike, so a dictionary of them only costs
            repeating = [name for name in table.column_names if name not in texts]
            self._parquet = pq.ParquetWriter(
                self._folder / TABLE_FILE, table.schema, compression="zstd", use_dictionary=repeating
            )
        if len(table):
            self._parquet.write_table(table)

    def _put_aside(self, bad: BadRow, file: str) -> None:
        where = {"file": file} if file else {}
        raw = (
            limits.shorten(bad.raw)
            if isinstance(bad.raw, str)
            else {name: limits.shorten(value) for name, value in bad.raw.items()}
        )
        self._set_aside.write(json.dumps({**where, "line": bad.line, "reason": bad.reason, "raw": raw}) + "\n")
        kind = bad.reason.split(":")[0]  # "broken quoting: <detail>" counts under "broken quoting"
        seen = self._reasons.setdefault(f"{kind} in {file}" if file else kind, {"rows": 0, "lines": []})
        seen["rows"] += 1
        if len(seen["lines"]) < _LINES_SHOWN:
            seen["lines"].append(bad.line)

    def _count_aside(self, labels: list[str]) -> None:
        """Labels of rows set aside; those that are no label of a kept row are left out at the end, and may be many."""
        known = (name for name in labels if name and (name in self._aside or len(self._aside) < _MANY_LABELS))
        self._aside.update(known)

    def _labels_of_bad(self, bad: list[BadRow]) -> list[str]:
        """The labels of rows that could be cut into columns though not read."""
        labels = [row.raw.get(self.schema.label_column, "") for row in bad if isinstance(row.raw, dict)]
        readable = pa.table({self.schema.label_column: pa.array([x for x in labels if is_text([x])], STRING)})
        found: list[str] = self.schema.label_values(Rows(readable)).to_pylist()
        return found

    def _encode(self, values: pa.Array) -> NDArray[np.int64]:
        """[rows] codes in order of appearance."""
        encoded = values.dictionary_encode()
        codes = np.array(
            [self._codes.setdefault(v, len(self._codes)) for v in encoded.dictionary.to_pylist()], dtype=np.int64
        )
        self._check_labels()
        found: NDArray[np.int64] = codes[encoded.indices.to_numpy(zero_copy_only=False)]
        return found

    def _check_labels(self) -> None:
        if len(self._codes) > MAX_LABELS:
            shown = ", ".join(list(self._codes)[:3])
            raise DataError(
                f"label column {self.schema.label_column} holds more than {MAX_LABELS:,} different values "
                f"({shown}, ...); name a column of classes with --label-column"
            )

    def _describe_reasons(self) -> str:
        described = [
            f"{reason}: {seen['rows']} rows, first line {seen['lines'][0]}" for reason, seen in self._reasons.items()
        ]
        if any(reason.startswith(UNPARSABLE_DATE) for reason in self._reasons):
            described.append(f"dates are read as {DATE_FORMATS}")
        return "; ".join(described)


def _problem_rows(chunk: Chunk, problems: NDArray[np.object_]) -> list[BadRow]:
    where = np.flatnonzero(problems != "")
    raw = chunk.table.take(where).to_pylist() if len(where) else []
    return [BadRow(int(chunk.line[i]), problems[i], row) for i, row in zip(where, raw, strict=True)]
