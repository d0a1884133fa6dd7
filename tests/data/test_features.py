from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from bertforge.data.features import FEATURES, derive, require_readable
from bertforge.data.rows import Rows
from bertforge.data.schema import QUESTIONS, Schema
from bertforge.data.tables import read_chunks
from bertforge.errors import DataError

from .tables import COLUMNS, question


def derive_one(**changes: str) -> dict[str, Any]:
    frame = pd.DataFrame([question(0, **changes)], columns=COLUMNS)
    (chunk,) = read_chunks(frame)
    return derive(Rows(chunk.table), QUESTIONS).to_pylist()[0]


def test_every_feature_by_hand() -> None:
    found = derive_one(
        PostCreationDate="08/02/2008 23:59:59",
        OwnerCreationDate="08/01/2008 11:59:59",
        ReputationAtPostCreation="-34",
        OwnerUndeletedAnswerCountAtPostTime="7",
        Title="  Why does  it crash? ",
        BodyMarkdown="one two\r\n    code\r\n\tmore\r\n  not code http://a.b and https://c.d ?\n",
        Tag1="c++",
        Tag2="",
        Tag3="gcc",
    )
    assert found == {
        "account_age_days": 1.5,
        "tag_count": 2.0,
        "reputation": -34.0,
        "title_words": 4.0,
        "body_words": 10.0,
        "answers_before": 7.0,
        "days_since_start": pytest.approx(2 + 86399 / 86400),
        "hour": 23.0,
        "weekday": 5.0,  # a Saturday
        "first_tag": "c++",
        "tags": "c++ gcc",
        "code_lines": 2.0,
        "question_marks": 2.0,
        "links": 2.0,
        "title_capitalised": 1.0,
        "title_characters": 19.0,
        "title_question_marks": 1.0,
        "code_characters": 17.0,  # "    code\r\n" and "\tmore\r\n"
        "code_share": pytest.approx(17 / 66),
        "prose_words": 8.0,
        "prose_question_marks": 1.0,
        "first_person": 0.0,
        "paragraph_breaks": 0.0,
        "backticks": 0.0,
    }
    assert list(found) == list(FEATURES)


def test_missing_values_stay_missing() -> None:
    found = derive_one(OwnerCreationDate="", ReputationAtPostCreation="", Tag1="", Tag2="", PostCreationDate="")
    for name in ("account_age_days", "reputation", "days_since_start", "hour", "weekday", "first_tag", "tags"):
        assert found[name] is None, name
    assert found["tag_count"] == 0


def test_an_owner_date_may_lack_its_time() -> None:
    found = derive_one(OwnerCreationDate="2008-07-31", PostCreationDate="08/01/2008 12:00:00")
    assert found["account_age_days"] == 1.5


@pytest.mark.parametrize(
    ("written", "utc"),
    [
        ("2012-07-31T23:30:00-05:00", "2012-08-01T04:30:00"),
        ("2012-08-01 04:30:00+0530", "2012-07-31T23:00:00"),
        ("2012-07-31T23:30:00Z", "2012-07-31T23:30:00"),
        ("2012-07-31T23:30:00", "2012-07-31T23:30:00"),
    ],
)
def test_a_date_with_an_offset_is_read_as_utc(written: str, utc: str) -> None:
    dates = Rows(pa.table({"d": pa.array([written, "2012-07-31"], pa.large_string())})).date("d")
    assert dates.tolist() == np.array([utc, "2012-07-31T00:00:00"], "datetime64[s]").tolist()


def test_columns_whose_sources_are_absent_are_left_out() -> None:
    derived = derive(Rows(pa.table({"Title": ["a b"], "BodyMarkdown": ["c?"]})), QUESTIONS)
    assert set(derived.column_names) == {
        "title_words",
        "body_words",
        "code_lines",
        "question_marks",
        "links",
        "title_capitalised",
        "title_characters",
        "title_question_marks",
        "code_characters",
        "code_share",
        "prose_words",
        "prose_question_marks",
        "first_person",
        "paragraph_breaks",
        "backticks",
    }


def test_another_table_has_no_derived_columns() -> None:
    schema = Schema("table", ("Title",), "y")
    assert derive(Rows(pa.table({"Title": ["a"]})), schema).num_columns == 0


def test_word_counts_are_those_of_python() -> None:
    texts = ["", " ", "a", "a  b\n\nc\t d ", "ünïcode wörds", "x" * 5000]
    derived = derive(Rows(pa.table({"BodyMarkdown": pa.array(texts, pa.large_string())})), QUESTIONS)
    assert derived["body_words"].to_pylist() == [len(text.split()) for text in texts]


def test_no_row_at_all_is_no_row_of_every_column() -> None:
    empty = pa.table({column: pa.array([], pa.large_string()) for column in COLUMNS})
    derived = derive(Rows(empty), QUESTIONS)
    assert derived.num_rows == 0
    assert derived.column_names == list(FEATURES)


def test_every_derived_column_says_what_it_is() -> None:
    assert all(feature.compute.__doc__ for feature in FEATURES.values())


def test_dates_are_parsed_strictly() -> None:
    good = ["07/31/2008 21:42:52", "07/31/2008", "2008-07-31", "2008-07-31T21:42:52", "2008-07-31 21:42:52.5"]
    wrong = ["31/07/2008 21:42:52", "02/30/2012 00:00:00", "07/31/2008 25:00:00", "yesterday", "5", ""]
    dates = Rows(pa.table({"d": pa.array(good + wrong, pa.large_string())})).date("d")
    assert (dates[: len(good)].astype("datetime64[D]") == np.datetime64("2008-07-31")).all()
    assert np.isnat(dates[len(good) :]).all()


def test_first_person_backticks_and_paragraphs_are_counted_in_prose() -> None:
    found = derive_one(BodyMarkdown="I tried `x`.\r\n\r\nIt fails; I think I know.\n\n\n    I = 1\n\n")
    assert found["first_person"] == 3.0  # not the I of a code line, nor that of "It"
    assert found["backticks"] == 2.0
    assert found["paragraph_breaks"] == 3.0


def test_a_missing_derived_column_is_named_with_the_sources_it_lacks() -> None:
    given = ["Title", "BodyMarkdown", "PostCreationDate", "title_words"]
    with pytest.raises(DataError) as caught:
        require_readable(["title_words", "account_age_days"], given)
    assert str(caught.value) == (
        "the model reads 'account_age_days', made from OwnerCreationDate, which the table lacks; "
        "it has Title, BodyMarkdown, PostCreationDate"
    )


def test_a_missing_column_is_named_with_those_there_are() -> None:
    require_readable(["n", "c"], ["c", "m", "n"])
    with pytest.raises(DataError, match="reads column 'x', but the table has n, c, m"):
        require_readable(["n", "x"], ["n", "c", "m"])
