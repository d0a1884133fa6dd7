from __future__ import annotations

import pyarrow as pa
import pytest

from bertforge.data.rows import Rows
from bertforge.data.schema import QUESTIONS, STATUSES, Schema, choose_schema, kind_of_labels, look_alikes, sort_labels
from bertforge.errors import DataError, UsageError

from .tables import COLUMNS


def table(*columns: str) -> pa.Table:
    return pa.table([pa.array([], pa.large_string())] * len(columns), names=columns)


def test_the_questions_table_is_recognised_by_its_columns() -> None:
    assert choose_schema(table(*COLUMNS), (), None, None) == QUESTIONS


def test_a_missing_column_is_named_with_those_found() -> None:
    with pytest.raises(
        DataError, match=r"no column BodyMarkdown, which a table of Stack .* it has PostId, .*OpenStatus"
    ):
        choose_schema(table(*[column for column in COLUMNS if column != "BodyMarkdown"]), (), None, None)
    with pytest.raises(DataError, match=r"the table has no column txt; did you mean Text\? it has Text, y"):
        choose_schema(table("Text", "y"), ("txt",), "y", None)
    with pytest.raises(DataError, match=r"the table has no columns a, b; it has Text, y"):
        choose_schema(table("Text", "y"), ("a", "b"), "y", None)


def test_a_table_of_another_kind_is_told_which_options_to_type() -> None:
    texts = [" ".join(f"w{i * j % 97}" for j in range(5, 12)) for i in range(60)]
    mails = pa.table({"my text": texts, "folder": ["a", "b", "c"] * 20, "day": ["1", "2"] * 30})
    mails = mails.cast(pa.schema([(name, pa.large_string()) for name in mails.column_names]))
    with pytest.raises(
        UsageError, match="--label-column, for example --text-columns 'my text' --label-column folder; the"
    ):
        choose_schema(mails, (), None, None)
    with pytest.raises(
        UsageError, match="for example --text-columns 'my text' --label-column day; the table has my text"
    ):
        choose_schema(mails, (), "day", None)
    with pytest.raises(UsageError, match=r"--text-columns and --label-column; the table has text, y$"):
        choose_schema(table("text", "y"), ("text",), None, None)
    with pytest.raises(UsageError, match=r"the table has a:b; if that should be several, .* --separator"):
        choose_schema(table("a:b"), (), None, None)
    with pytest.raises(DataError, match="no column folders; did you mean folder"):
        choose_schema(mails, (), "folders", None)
    with pytest.raises(UsageError, match="give the answer away"):
        choose_schema(table("text", "y"), ("text", "y"), "y", None)


def test_closed_is_every_status_but_open() -> None:
    rows = Rows(pa.table({"OpenStatus": pa.array([*STATUSES, "", "reopened", " OPEN "], pa.large_string())}))
    assert QUESTIONS.encode_labels(rows).tolist() == [0, 1, 1, 1, 1, -1, -1, 0]


def test_other_labels_are_matched_by_name() -> None:
    schema = Schema("table", ("t",), "y", ("no", "yes"))
    rows = Rows(pa.table({"y": pa.array(["yes", " no ", "maybe", ""], pa.large_string())}))
    assert schema.encode_labels(rows).tolist() == [1, 0, -1, -1]


def test_numbers_sort_as_numbers() -> None:
    assert sort_labels(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sort_labels(["b", "10", "9"]) == ("10", "9", "b")
    assert sort_labels(["1", "--1"]) == ("--1", "1")


def test_saved_and_read_back() -> None:
    for schema in (QUESTIONS, Schema("table", ("a", "b"), "y", ("0", "1"), "d")):
        assert Schema.from_dict(schema.to_dict()) == schema


def test_a_schema_saved_before_labels_had_a_kind_is_read() -> None:
    saved = Schema("table", ("a",), "y", ("0", "1")).to_dict()
    del saved["label_kind"]
    assert Schema.from_dict(saved).original_labels() == ("0", "1")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["0", "-1", "10"], "integer"),
        (["0.0", "1.0", "2"], "integer"),
        (["True", "false"], "boolean"),
        (["007", "8"], "text"),  # as a number it would not come back as it was
        (["1.5", "2"], "text"),
        (["true", "maybe"], "text"),
        ([], "text"),
    ],
)
def test_labels_tell_their_kind_by_how_they_are_spelled(values: list[str], kind: str) -> None:
    assert kind_of_labels(values) == kind


def test_labels_are_given_back_as_they_were() -> None:
    assert Schema("table", ("t",), "y", ("0", "1"), label_kind="integer").original_labels() == (0, 1)
    flags = Schema("table", ("t",), "y", ("false", "true"), label_kind="boolean").original_labels()
    assert flags == (False, True)
    assert all(isinstance(flag, bool) for flag in flags)


@pytest.mark.parametrize(
    ("names", "values", "codes"),
    [
        (("false", "true"), ["True", "FALSE", "true", "yes"], [1, 0, 1, -1]),
        (("False", "True"), ["true", "False"], [1, 0]),  # of a model made before there was one spelling
        (("0", "1"), ["1.0", "0", "1.5"], [1, 0, -1]),
        (("no", "true"), ["True", "true"], [-1, 1]),
        (("True", "true"), ["true", "True", "TRUE"], [1, 0, 0]),  # two classes of a table that says they are text
        (("1", "1.0"), ["1.0", "1"], [1, 0]),
    ],
)
def test_booleans_and_numbers_match_in_every_spelling(
    names: tuple[str, ...], values: list[str], codes: list[int]
) -> None:
    rows = Rows(pa.table({"y": pa.array(values, pa.large_string())}))
    assert Schema("table", ("t",), "y", names).encode_labels(rows).tolist() == codes


def test_labels_that_differ_by_case_or_spaces_are_found() -> None:
    assert look_alikes(["Spam", "spam", "ham", "not spam", "Not  spam"]) == [
        ["Spam", "spam"],
        ["not spam", "Not  spam"],
    ]
