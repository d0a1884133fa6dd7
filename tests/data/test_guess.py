from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bertforge.data.guess import GuessedColumns, guess_columns
from bertforge.data.tables import read_chunks

from .tables import questions

ROWS = 600
RNG = np.random.default_rng(0)
WORDS = np.array([f"word{i}" for i in range(3000)])
LABELS = RNG.choice(["late", "lost", "fine"], ROWS, p=[0.5, 0.3, 0.2])


def table(**columns: object) -> pd.DataFrame:
    """Complaints with a message, a label and further columns."""
    messages = [" ".join(RNG.choice(WORDS, RNG.integers(5, 20))) + "." for _ in range(ROWS)]
    return pd.DataFrame({"message": messages, "kind_of": LABELS, **columns})


def guess(frame: pd.DataFrame, label: str | None = "kind_of") -> GuessedColumns:
    return guess_columns(next(read_chunks(frame)).table, label)


def test_each_column_gets_one_place() -> None:
    frame = table(
        amount=RNG.lognormal(3, 2, ROWS).round(2),
        height=RNG.normal(170, 10, ROWS).round(1),
        stars=RNG.integers(1, 6, ROWS),
        country=RNG.choice(["de", "fr", ""], ROWS),
        tags=[" ".join(RNG.choice(WORDS[:60], 3, replace=False)) for _ in range(ROWS)],
        received=pd.date_range("2020-01-01", periods=ROWS).astype(str),
        user_id=RNG.integers(1, 10**9, ROWS),
        row=np.arange(ROWS) * 3,
        email=[f"{i}@example.org" for i in RNG.permutation(ROWS)],
        source="web",
        note=["x" if i == 5 else "" for i in range(ROWS)],
    )
    found = guess(frame)
    assert (found.text, found.label) == (("message",), "kind_of")
    assert (found.numeric, found.log) == (("amount", "height"), ("amount",))
    assert found.categorical == ("stars", "country")
    assert (found.multi, found.dates, found.leaks) == ("tags", ("received",), {})
    assert found.left_out == {
        "user_id": "numbers that its name calls an id",
        "row": "whole numbers that rise or fall from row to row: an id",
        "email": "its values hardly repeat",
        "source": "always 'web'",
        "note": "blank in 599 of 600 rows",
    }
    placed = [*found.text, *found.numeric, *found.categorical, found.multi, *found.dates, *found.left_out, found.label]
    assert sorted(map(str, placed)) == sorted(frame.columns)


@pytest.mark.parametrize(
    ("leak", "told"),
    [
        pytest.param(pd.Series(LABELS).map({"late": 7, "lost": 8, "fine": 9}), "late", id="a copy of the label"),
        pytest.param([f"{i} days" if x == "late" else "" for i, x in enumerate(LABELS)], "late", id="filled for one"),
        pytest.param([100 * (x == "fine") + RNG.normal() for x in LABELS], "fine", id="a number beyond a bound"),
    ],
)
def test_a_column_that_gives_a_class_away_is_no_input(leak: object, told: str) -> None:
    found = guess(table(reason=leak, stars=RNG.integers(1, 6, ROWS)))
    assert list(found.leaks) == ["reason"]
    assert f"label {told!r}" in found.leaks["reason"]
    assert found.categorical == ("stars",)


def test_a_column_that_only_helps_is_no_leak_and_neither_is_a_rare_class() -> None:
    helps = np.where(RNG.random(ROWS) < 0.9, LABELS, "fine")
    assert guess(table(hint=helps)).leaks == {}
    rare = table(hint=RNG.choice(["a", "b"], ROWS)).assign(kind_of=np.where(np.arange(ROWS) < 590, "no", "yes"))
    assert guess(rare).leaks == {}, "always saying no is right in 98% of the rows, whatever the column"


def test_values_that_hardly_repeat_give_nothing_away() -> None:
    twice = table(code=[f"c{i // 2}" for i in range(ROWS)], thrice=[f"d{i // 3}" for i in RNG.permutation(ROWS)])
    assert guess(twice).leaks == {}


def test_a_repeated_text_is_no_leak() -> None:
    frame = table()
    twice = pd.concat([frame, frame, frame])
    assert guess(twice).text == ("message",)


def test_the_label_is_guessed_by_name_then_by_fewest_values() -> None:
    two = table(airline=RNG.choice(["x", "y"], ROWS))
    assert guess(two, None).label == "airline"
    assert guess(two.rename(columns={"kind_of": "sentiment"}), None).label == "sentiment"
    assert guess(table()[["message"]], None).label is None


def test_text_without_spaces_and_single_words_are_found() -> None:
    characters = [chr(code) for code in range(0x4E00, 0x5E00)]
    chinese = table().assign(message=["".join(RNG.choice(characters, 12)) for _ in range(ROWS)])
    chinese["email"] = [f"{i}@long.example.org" for i in range(ROWS)]
    assert guess(chinese).text == ("message",)
    names = table().assign(message=[f"Name{i}" for i in RNG.permutation(ROWS)], code=[f"c{i}" for i in range(ROWS)])
    found = guess(names)
    assert found.text == ("message",), "the longest where nothing reads like sentences"
    assert list(found.left_out) == ["code"]


def test_tags_are_text_where_nothing_else_is() -> None:
    tags = [" ".join(RNG.choice(WORDS[:60], 3, replace=False)) for _ in range(ROWS)]
    found = guess(table().assign(message=tags))
    assert (found.text, found.multi) == (("message",), "")


def test_the_questions_table() -> None:
    found = guess(questions(400), "OpenStatus")
    assert "Tag1" in found.categorical
    assert "PostCreationDate" in found.dates
    assert found.left_out["PostId"] == "numbers that its name calls an id"


@pytest.mark.parametrize("name", ["id", "ID", "user_id", "Clothing ID", "userId", "PostID", "row key"])
def test_ids_are_told_by_their_names(name: str) -> None:
    numbers = RNG.integers(0, 10**6, ROWS)
    assert list(guess(table(**{name: numbers})).left_out) == [name]


@pytest.mark.parametrize("name", ["amount_paid", "Bid", "turkey", "ideas"])
def test_words_that_end_like_an_id_are_none(name: str) -> None:
    numbers = RNG.integers(0, 10**6, ROWS)
    assert guess(table(**{name: numbers})).numeric == (name,)


def test_a_table_without_rows_has_no_columns_of_use(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("message,kind_of\n")
    found = guess_columns(next(read_chunks(tmp_path / "t.csv")).table, "kind_of")
    assert (found.text, found.left_out) == ((), {"message": "blank in 0 of 0 rows"})
