from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from bertforge.data import limits
from bertforge.data.features import FEATURES
from bertforge.data.prepare import PrepareOptions, prepare
from bertforge.data.raw import read_raw
from bertforge.data.schema import QUESTIONS, Schema
from bertforge.data.tokens import Tokenizer
from bertforge.errors import DataError

from .tables import COLUMNS, question, questions, write_csv


def test_good_rows_are_read_as_prepare_reads_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = write_csv(tmp_path / "t.csv", questions(60))
    data = prepare(table, tmp_path / "out", tokenizer)
    (rows,) = read_raw(table, data.schema, require_labels=True)
    assert rows.labels is not None
    assert rows.labels.tolist() == data.labels.tolist()
    assert rows.texts == data.texts(range(60))
    assert rows.problems == [""] * 60
    columns = [*COLUMNS, *FEATURES]
    pd.testing.assert_frame_equal(rows.frame[columns], data.columns(columns))


def test_no_row_is_dropped_and_the_order_is_the_files(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", pd.DataFrame([question(i, BodyMarkdown=f"b {i} é") for i in range(5)]))
    lines = table.read_bytes().split(b"\n")
    lines[2] = b'1,"torn "row"'
    lines[4] = lines[4].replace(b"b 3", b"\xff")
    table.write_bytes(b"\n".join(lines))
    (rows,) = read_raw(table, QUESTIONS, require_labels=False)
    assert rows.frame["PostId"].tolist() == ["0", "", "2", "", "4"]
    assert rows.lines.tolist() == [2, 3, 4, 5, 6]
    assert [problem.split(":")[0] for problem in rows.problems] == ["", "broken quoting", "", "not UTF-8", ""]
    assert [text.strip() == "" for text in rows.texts] == [False, True, False, True, False]
    assert rows.labels is None


def test_problems_and_unknown_labels_come_along(tmp_path: Path) -> None:
    frame = pd.DataFrame([question(0, Title=""), question(1, OpenStatus="?"), question(2)], columns=COLUMNS)
    (rows,) = read_raw(frame, QUESTIONS, require_labels=True)
    assert rows.problems == ["missing Title", "unknown OpenStatus", ""]
    assert rows.labels is not None
    assert rows.labels.tolist() == [1 if question(0)["OpenStatus"] != "open" else 0, -1, 0]


def test_text_alone_is_enough_to_predict_from(tmp_path: Path) -> None:
    (rows,) = read_raw(pd.DataFrame({"Title": ["a"], "BodyMarkdown": ["b c"]}), QUESTIONS, require_labels=False)
    assert rows.texts == ["a b c"]
    assert rows.frame["body_words"].tolist() == [2.0]
    assert "reputation" not in rows.frame


def test_columns_that_the_model_reads_as_numbers_must_hold_some(tmp_path: Path) -> None:
    schema = Schema("table", ("a",), "y", ("0", "1"))
    frame = pd.DataFrame({"a": ["w", "x", "z"], "amount": ["14,013", "7", ""], "other": ["1,5"] * 3})
    (rows,) = read_raw(frame, schema, require_labels=False, numbers=("amount", "absent"))
    assert rows.problems == ["unparsable number in amount", "", ""]


def test_a_derived_column_takes_the_place_of_one_of_its_name(tmp_path: Path) -> None:
    frame = pd.DataFrame([question(1)], columns=COLUMNS).assign(tags="their own", hour="9", more="kept")
    (rows,) = read_raw(frame, QUESTIONS, require_labels=False)
    assert (rows.frame["tags"].tolist(), rows.frame["more"].tolist()) == (["html sorting"], ["kept"])
    (rows,) = read_raw(frame.drop(columns="PostCreationDate"), QUESTIONS, require_labels=False)
    assert "hour" not in rows.frame, "what is no hour of posting must not pass for one"


def test_a_missing_text_or_label_column_is_named(tmp_path: Path) -> None:
    schema = Schema("table", ("a", "b"), "y", ("0", "1"))
    frame = pd.DataFrame({"a": ["x"], "c": ["z"]})
    with pytest.raises(DataError, match="the table has no column b, which the model needs; it has a, c"):
        list(read_raw(frame, schema, require_labels=False))
    with pytest.raises(DataError, match="no column y"):
        list(read_raw(frame.assign(b="w"), schema, require_labels=True))


def test_a_row_over_a_limit_is_for_prediction_what_it_is_for_training(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No label from half of a text that training would not read, and its line and reason in both."""
    monkeypatch.setattr(limits, "CELL", 1000)
    monkeypatch.setattr(limits, "ROW", 30_000)
    rows = [f"why {number} list,{number % 2}" for number in range(40)]
    rows[7], rows[11], rows[20] = f"{'long ' * 300},1", f"{'long ' * 9000},1", "lone\rreturn,1"
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["a,y", *rows]))
    options = PrepareOptions(text_columns=("a",), label_column="y")
    data = prepare(table, tmp_path / "out", tokenizer, options)
    aside = [json.loads(line) for line in (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()]
    (read,) = read_raw(table, data.schema, require_labels=False)
    assert [(row["line"], row["reason"]) for row in aside] == [
        (line, problem) for line, problem in zip(read.lines.tolist(), read.problems, strict=True) if problem
    ]
    assert [row["line"] for row in aside] == [9, 13, 22]
    assert len(data) + len(aside) == len(read.texts) == 40
    assert [len(row["raw"]) > limits.SHOWN for row in aside] == [False, True, False]
    assert aside[1]["raw"].endswith("long ... (30,001 characters)")


def test_a_label_that_is_a_text_is_set_aside(tmp_path: Path, tokenizer: Tokenizer) -> None:
    frame = pd.DataFrame({"a": [f"why {number} list" for number in range(40)], "y": ["0", "1"] * 20})
    frame.loc[3, "y"] = "l" * 1001
    options = PrepareOptions(text_columns=("a",), label_column="y")
    data = prepare(write_csv(tmp_path / "t.csv", frame), tmp_path / "out", tokenizer, options)
    assert data.manifest["set_aside"] == {"y of more than 1,000 characters": {"rows": 1, "lines": [5]}}


def test_only_the_derived_columns_that_are_wanted_are_made(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", questions(5))
    (whole,) = read_raw(table, QUESTIONS, require_labels=False)
    (some,) = read_raw(table, QUESTIONS, require_labels=False, derived=("body_words", "absent"))
    (none,) = read_raw(table, QUESTIONS, require_labels=False, derived=())
    assert not set(none.frame) & set(FEATURES)
    assert set(some.frame) - set(none.frame) == {"body_words"}
    assert set(whole.frame) - set(none.frame) == set(FEATURES)
    assert some.frame["body_words"].tolist() == whole.frame["body_words"].tolist()
    assert none.problems == whole.problems
