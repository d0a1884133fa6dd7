from __future__ import annotations

import pandas as pd
import pytest

from bertforge.data.clean import find_problems
from bertforge.data.rows import Rows
from bertforge.data.schema import QUESTIONS, Schema
from bertforge.data.tables import read_chunks

from .tables import COLUMNS, question


def problem(schema: Schema = QUESTIONS, *, labelled: bool = True, **row: str) -> str:
    frame = pd.DataFrame([row])
    (chunk,) = read_chunks(frame)
    return str(find_problems(Rows(chunk.table), schema, labelled=labelled)[0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"OwnerCreationDate": ""}, ""),
        ({"OwnerCreationDate": "07/31/2008"}, ""),
        ({"ReputationAtPostCreation": ""}, ""),
        ({"Tag1": "", "PostClosedDate": ""}, ""),
        ({"OpenStatus": " Off Topic "}, ""),
        ({"Title": " "}, "missing Title"),
        ({"BodyMarkdown": "\r\n"}, "missing BodyMarkdown"),
        ({"PostCreationDate": ""}, "missing PostCreationDate"),
        ({"PostCreationDate": "13/13/2010 00:00:00"}, "unparsable date in PostCreationDate"),
        ({"OwnerCreationDate": "soon"}, "unparsable date in OwnerCreationDate"),
        ({"PostClosedDate": "soon"}, "unparsable date in PostClosedDate"),
        ({"ReputationAtPostCreation": "many"}, "unparsable number in ReputationAtPostCreation"),
        ({"OwnerUndeletedAnswerCountAtPostTime": "inf"}, "unparsable number in OwnerUndeletedAnswerCountAtPostTime"),
        ({"OpenStatus": ""}, "missing OpenStatus"),
        ({"OpenStatus": "closed"}, "unknown OpenStatus"),
    ],
)
def test_reasons_of_a_questions_row(changes: dict[str, str], reason: str) -> None:
    assert problem(**question(0, **changes)) == reason


def test_a_row_to_predict_needs_no_label_and_no_date() -> None:
    row = question(0, PostCreationDate="", OpenStatus="", PostClosedDate="soon")
    assert problem(**row) == "missing PostCreationDate"
    assert problem(labelled=False, **row) == ""
    assert problem(labelled=False, Title="a", BodyMarkdown="b") == ""


def test_another_table_needs_some_text_and_a_label() -> None:
    schema = Schema("table", ("a", "b"), "y", ("no", "yes"))
    assert problem(schema, a="", b="x", y="yes") == ""
    assert problem(schema, a="", b=" ", y="yes") == "missing text (a, b)"
    assert problem(schema, a="x", b="", y="") == "missing y"
    assert problem(schema, a="x", b="", y="maybe") == "unknown y"


def test_only_the_rows_at_fault_are_marked() -> None:
    frame = pd.DataFrame([question(0), question(1, Title=""), question(2)], columns=COLUMNS)
    (chunk,) = read_chunks(frame)
    assert find_problems(Rows(chunk.table), QUESTIONS, labelled=True).tolist() == ["", "missing Title", ""]
