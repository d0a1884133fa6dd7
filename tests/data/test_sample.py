import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import typer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from bertforge.cli.sample import sample_data
from bertforge.data import sample
from bertforge.data.sample import (
    CLOSED_SHARES,
    COLUMNS,
    MADE_UP_FIRST_POST_ID,
    STYLES,
    Row,
    is_made_up,
    sample_row,
    sample_rows,
    write_sample,
)
from bertforge.data.schema import QUESTIONS, STATUSES, TAGS, choose_schema
from bertforge.errors import UsageError


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.DataFrame(sample_rows(3000, 1), columns=list(COLUMNS))


def test_a_row_depends_on_its_number_and_the_seed_only():
    assert list(sample_rows(100, 5)) == list(sample_rows(300, 5))[:100]
    assert sample_row(250, 5) == list(sample_rows(300, 5))[250]
    assert sample_row(0, 5)[6:8] != sample_row(0, 6)[6:8]
    assert sample_row(0, 5)[6:8] != sample_row(1, 5)[6:8]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_two_runs_write_the_same_bytes(tmp_path: Path, name: str):
    first, second, other = (
        write_sample(tmp_path / folder / name, sample_rows(50, seed)).read_bytes()
        for folder, seed in (("x", 3), ("y", 3), ("z", 4))
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_written_table_reads_back(tmp_path: Path, name: str):
    path = write_sample(tmp_path / name, sample_rows(200, 3))
    found = pd.read_csv(path, keep_default_na=False) if path.suffix == ".csv" else pd.read_parquet(path)
    assert list(found.itertuples(index=False, name=None)) == list(sample_rows(200, 3))


def test_the_table_is_recognised_as_the_questions_of_kaggle(table: pd.DataFrame):
    assert choose_schema(pa.Table.from_pandas(table), (), None, None) is QUESTIONS
    assert set(table["OpenStatus"]) == set(STATUSES) == {"open", *CLOSED_SHARES}


def test_dates_are_in_the_format_and_order_of_kaggle(table: pd.DataFrame):
    dates = {
        name: pd.to_datetime(table[name], format="%m/%d/%Y %H:%M:%S")
        for name in ("PostCreationDate", "OwnerCreationDate")
    }
    assert dates["PostCreationDate"].between(datetime(2008, 8, 1), datetime(2012, 8, 1)).all()
    assert (dates["OwnerCreationDate"] >= datetime(2008, 8, 1)).all()
    assert (dates["OwnerCreationDate"] <= dates["PostCreationDate"]).all()
    closed = table["OpenStatus"] != "open"
    assert ((table["PostClosedDate"] != "") == closed).all()
    closing = pd.to_datetime(table["PostClosedDate"][closed], format="%m/%d/%Y %H:%M:%S")
    assert (closing >= dates["PostCreationDate"][closed]).all()


def test_the_open_share_falls_over_the_years(table: pd.DataFrame):
    share = (table["OpenStatus"] == "open").groupby(table["PostCreationDate"].str[6:10]).mean()
    assert share["2009"] > 0.60 > share["2010"] > 0.54 > share["2011"] > share["2012"] > 0.42


def test_owners_have_one_sign_up_date_and_some_ask_again(table: pd.DataFrame):
    assert (table.groupby("OwnerUserId")["OwnerCreationDate"].nunique() == 1).all()
    assert 0.02 < table["OwnerUserId"].duplicated().mean() < 0.4
    reputation = table["ReputationAtPostCreation"]
    assert reputation.between(-34, 200_000).all()
    assert reputation.max() > 20_000 > 1_000 > reputation.median() > 5
    is_open = table["OpenStatus"] == "open"
    assert reputation[is_open].median() > 2 * reputation[~is_open].median()


def test_tags_are_one_to_five_without_gaps_or_repeats(table: pd.DataFrame):
    for tags in table[list(TAGS)].itertuples(index=False):
        given = [tag for tag in tags if tag]
        assert list(tags) == given + [""] * (5 - len(given))
        assert 1 <= len(given) == len(set(given))


def test_questions_are_distinct_and_of_varied_length(table: pd.DataFrame):
    text = table["Title"] + table["BodyMarkdown"]
    assert text.nunique() > 0.999 * len(text)
    words = text.str.split().str.len()
    assert words.quantile(0.05) < 35 < words.median() < 75 < words.quantile(0.95)


def test_every_slot_has_a_symbol_and_every_symbol_is_used():
    grammar, topics = sample._material()
    from_topic = {"tool", "tool2", "error", "call", "task", "code"}
    drawn_by_code = {"open_facts", "closed_facts", "rider", "said_first", "said_second", *STATUSES}
    drawn_by_code |= {*STYLES, *(f"{style}_title" for style in STYLES)}
    slots = {
        part.removeprefix("^") for choices in grammar.alternatives.values() for parts in choices for part in parts[1::2]
    }
    slots |= {name for topic in topics for text in topic.tasks for name in re.findall(r"\{(\w+)\}", text)}
    symbols = set(grammar.alternatives)
    assert slots <= symbols | from_topic | {
        "focus",
        "aside",
        "facts",
        "facts2",
        "first",
        "second",
        "wanted",
        "unwanted",
    }
    assert symbols <= slots | drawn_by_code | {topic.code for topic in topics}


def test_no_slot_is_left_unfilled(table: pd.DataFrame):
    assert not (table["Title"] + table["BodyMarkdown"]).str.contains(r"\{\^?\w+\}").any()


def accuracy_of_words(rows: list[Row], train: int) -> float:
    texts, closed = [f"{row[6]} {row[7]}" for row in rows], np.array([row[-1] != "open" for row in rows])
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(texts[:train])
    model = LogisticRegression().fit(words.transform(texts[:train]), closed[:train])
    return float(model.score(words.transform(texts[train:]), closed[train:]))


def test_words_alone_help_but_do_not_solve_it(monkeypatch: pytest.MonkeyPatch):
    assert 0.62 < accuracy_of_words(list(sample_rows(2400, 1)), 1600) < 0.76
    monkeypatch.setattr(sample, "STYLES", {"plain": 1.0})
    monkeypatch.setattr(sample, "LABEL_NOISE", 0.0)
    assert accuracy_of_words(list(sample_rows(2400, 1)), 1600) > 0.93


def test_made_up_rows_are_told_from_real_ones(table: pd.DataFrame):
    real = table.assign(PostId=np.arange(len(table)) + 11_000_000)
    assert is_made_up(table)
    assert is_made_up(table.astype(str))
    assert is_made_up(pd.concat([real, table.head(1)]))
    assert not is_made_up(real)
    assert not is_made_up(real.drop(columns="PostId"))
    assert table["PostId"].tolist() == list(range(MADE_UP_FIRST_POST_ID, MADE_UP_FIRST_POST_ID + len(table)))


def test_a_suffix_we_cannot_write_is_refused_before_anything_is_drawn(tmp_path: Path):
    def never():
        raise AssertionError("a row was drawn")
        yield

    with pytest.raises(UsageError, match=r"'a\.xlsx'; name a file that ends in \.csv or \.parquet"):
        write_sample(tmp_path / "a.xlsx", never())
    with pytest.raises(UsageError, match="--rows 1 or more"):
        sample_rows(0, 1)
    assert not list(tmp_path.iterdir())


def test_the_command_says_that_the_questions_are_made_up(tmp_path: Path):
    app = typer.Typer()
    app.command()(sample_data)
    result = CliRunner().invoke(app, [str(tmp_path / "q.csv"), "--rows", "20", "--seed", "9"])
    assert result.exit_code == 0, result.output
    assert "20 made-up questions, seed 9" in result.output
    assert is_made_up(pd.read_csv(tmp_path / "q.csv"))
