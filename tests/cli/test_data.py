from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bertforge.cli.data import prepare
from bertforge.errors import DataError

from ..data.tables import question, questions, write_csv

app = typer.Typer(rich_markup_mode="rich")
app.command()(prepare)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


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
    assert f"bertforge train --data {out}" in said
    again = run(str(table), "--out", str(out))
    assert "nothing to do" in again
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


def test_prepare_names_a_missing_column(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", questions(10).drop(columns="OpenStatus"))
    with pytest.raises(DataError, match="missing column OpenStatus"):
        run(str(table), "--out", str(tmp_path / "out"))
    assert question(0)["OpenStatus"]


def test_help_teaches_with_an_example() -> None:
    said = run("--help")
    assert "bertforge prepare train-sample.csv --out data" in said
    assert "--text-columns subject,message --label-column folder" in said
