"""Columns: what is read of an unknown table, and that everything which is not read is told."""

import pytest

from bertforge.autofit.columns import choose_columns
from bertforge.errors import DataError
from tests.autofit.tables import mails


@pytest.fixture
def table(tmp_path):
    def write(frame):
        path = tmp_path / "mails.csv"
        frame.to_csv(path, index=False)
        return path

    return write


def test_text_and_columns_are_found_and_what_is_left_out_is_told(table):
    found = choose_columns(table(mails()), "folder", (), seed=1)
    assert found.options.text_columns == ("message",)
    assert found.options.label_column == "folder"
    assert found.beside.to_dict()["numeric"] == ("size",)
    assert found.beside.to_dict()["categorical"] == ("country",)
    told = "\n".join(found.told)
    assert "text: message; label: folder" in told
    assert "columns that may help: size, country" in told
    assert "column action is left out: it tells the label 'inbox' from the others in 100.0% of the rows" in told
    assert "column ticket is left out: its values hardly repeat" in told


def test_text_that_is_named_is_taken_whatever_it_looks_like(table):
    found = choose_columns(table(mails()), "folder", ("country", "message"), seed=1)
    assert found.options.text_columns == ("country", "message")
    assert found.beside.to_dict()["categorical"] == ()
    assert "country" not in "\n".join(found.told[1:])


def test_a_table_sorted_by_its_label_is_sampled_throughout(table):
    """More rows than are looked at: the first 8,192 are all of one class, and would show no leak."""
    frame = mails(12_000).sort_values("folder")
    told = "\n".join(choose_columns(table(frame), "folder", (), seed=1).told)
    assert "column action is left out: it tells the label" in told


def test_a_table_of_text_alone_has_no_columns_beside_it(table):
    assert choose_columns(table(mails()[["message", "folder"]]), "folder", (), seed=1).beside is None


def test_a_column_that_is_not_there_is_told_with_the_closest_one(table):
    with pytest.raises(DataError, match=r"the table has no column foldr; did you mean folder. it has ticket, message"):
        choose_columns(table(mails()), "foldr", (), seed=1)
    with pytest.raises(DataError, match="the table has no column mesage; did you mean message"):
        choose_columns(table(mails()), "folder", ("mesage",), seed=1)


def test_a_table_of_only_a_header_is_told(table):
    with pytest.raises(DataError, match="holds no rows but a header"):
        choose_columns(table(mails()[:0]), "folder", (), seed=1)


def test_without_a_text_column_it_says_what_to_name(table):
    with pytest.raises(DataError, match="no column of the table reads like text; name one with --text-columns: size"):
        choose_columns(table(mails()[["size", "country", "folder"]]), "folder", (), seed=1)


def test_without_a_label_it_is_the_questions_table_or_prepare_says_what_is_missing(table, tmp_path):
    from bertforge.data.sample import sample_rows, write_sample

    questions = write_sample(tmp_path / "questions.csv", sample_rows(20, seed=1))
    assert "reputation" in choose_columns(questions, None, (), seed=1).beside.to_dict()["numeric"]
    assert choose_columns(table(mails()), None, (), seed=1).beside is None
