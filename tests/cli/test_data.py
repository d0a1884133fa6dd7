from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from bertforge.cli import main
from bertforge.cli.data import prepare
from bertforge.errors import DataError

from ..data.tables import questions, write_csv

app = typer.Typer(rich_markup_mode="rich")
app.command()(prepare)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def next_command(said: str) -> list[str]:
    """The arguments of the command that the last line names."""
    label, name, *arguments = shlex.split(said.splitlines()[-1])
    assert (label, name) == ("next:", "bertforge")
    return arguments


def test_prepare_says_what_it_kept_what_it_set_aside_and_what_comes_next(tmp_path: Path) -> None:
    frame = questions(100)
    frame.loc[10, "Title"] = ""
    frame.loc[20:22, "OpenStatus"] = "?"
    table, out = write_csv(tmp_path / "t.csv", frame), tmp_path / "out"
    said = run(str(table), "--out", str(out))
    assert "96 rows kept, 4 set aside" in said
    assert "1 missing Title: line 52" in said
    assert "3 unknown OpenStatus: line 102, 107, 112" in said
    assert "labels: open 47 (49.0%), closed 49 (51.0%)" in said
    assert "split random: train 77, validation 9, test 10" in said
    assert "split time: train 77" in said
    assert "tokens: median" in said
    assert f"wrote {out}" in said
    assert next_command(said) == ["train", "--data", str(out), "--out", "run", "--model", "minilm"]
    again = run(str(table), "--out", str(out))
    assert f"{out} is up to date" in again
    assert "96 rows kept" in again


def test_prepare_a_table_of_ones_own(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", questions(100))
    said = run(
        *(str(table), "--out", str(tmp_path / "out"), "--split", "time", "--date-column", "PostCreationDate"),
        *("--text-columns", "Title, BodyMarkdown", "--label-column", "Tag1"),
    )
    assert "labels: css 33 (33.0%), html 33 (33.0%), python 34 (34.0%)" in said
    assert "split time: train 80, validation 10, test 10" in said
    assert "split random" not in said
    assert next_command(said)[-2:] == ["--model", "minilm"], "train takes the split that was made"


def test_unparsable_dates_are_shown_with_the_formats_that_are_read(tmp_path: Path) -> None:
    frame = questions(100)
    frame.loc[10, "PostCreationDate"] = "yesterday"
    said = run(str(write_csv(tmp_path / "t.csv", frame)), "--out", str(tmp_path / "out"))
    assert "1 unparsable date in PostCreationDate: line 52\ndates are read as MM/DD/YYYY" in said


def test_each_printed_command_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a folder"
    said = CliRunner().invoke(main.app, ["sample-data", str(folder / "t.csv"), "--rows", "60"]).output
    for wanted in ("prepare", "train"):
        arguments = next_command(said)
        assert arguments[0] == wanted
        command = get_command(main.app).commands[wanted]
        command.make_context(wanted, arguments[1:])  # what cannot be parsed raises
        if wanted == "prepare":
            said = CliRunner().invoke(main.app, arguments).output


def test_prepare_names_a_missing_column(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", questions(10).drop(columns="OpenStatus"))
    with pytest.raises(DataError, match="the table has no column OpenStatus"):
        run(str(table), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_help_teaches_with_an_example() -> None:
    said = run("--help")
    assert "bertforge prepare train-sample.csv --out data" in said
    assert "--text-columns subject,message --label-column folder" in said


def test_prepare_warns_of_what_would_spoil_the_model(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"text": [f"text {i}" for i in range(400)], "y": ["spam" if i % 4 else "ham" for i in range(400)]}
    )
    frame.loc[frame.index[(frame["y"] == "spam")][:60], "text"] = ""
    frame.loc[398, "y"] = "Spam"
    options = ("--text-columns", "text", "--label-column", "y")
    said = run(str(write_csv(tmp_path / "t.csv", frame)), "--out", str(tmp_path / "out"), *options)
    aside = tmp_path / "out" / "set_aside.jsonl"
    assert f"WARNING: 60 of 400 rows (15.0%) were set aside and will not be learnt: see {aside}" in said
    assert (
        "WARNING: the rows set aside are not like the others: 100.0% of them are 'spam', but 70.3% of the rows" in said
    )
    assert "WARNING: labels 'Spam' (1 row) and 'spam' (239 rows) differ only by case or spaces" in said


def test_prepare_takes_test_rows_of_a_file_and_says_which_rows_repeat(tmp_path: Path) -> None:
    frame = questions(100)
    train, test = write_csv(tmp_path / "a.csv", frame[:80]), write_csv(tmp_path / "b.csv", frame[75:])
    said = run(str(train), "--out", str(tmp_path / "out"), "--test", str(test))
    assert "5 train rows repeat a text of a later part" in said
    assert "no validation rows were given: a tenth of the train rows were drawn for them" in said
    assert "split given: train 68, validation 7, test 25" in said


def test_a_separator_can_be_typed(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    questions(60).to_csv(table, sep="\t", index=False)
    for separator in ("tab", "\\t", "\t"):
        assert "60 rows kept" in run(str(table), "--out", str(tmp_path / separator), "--separator", separator)
