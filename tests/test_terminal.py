"""Whatever a table, a file name or a library brings along: the terminal shows it and does not obey it."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bertforge.data.streaming import progress
from bertforge.terminal import Terminal, VisibleFormatter, visible
from tests.data.tables import questions, write_csv
from tests.runs import run_command

HOSTILE = "\x1b[2J\x07\x9b\u202eno\u2066 [red]x[/red] :x:"
SHOWN = r"\x1b[2J\x07\x9b\u202eno\u2066 [red]x[/red] :x:"
BELL = r"\x07"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture
def terminal(monkeypatch):
    """One that writes no colours of its own, and what it wrote."""
    monkeypatch.setenv("COLUMNS", "200")
    found = Terminal()
    found.file = io.StringIO()
    return found


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("over\rwritten", r"over\rwritten"),
        ("\x7f\x00\x0b\x0c\x08", r"\x7f\x00\x0b\x0c\x08"),
        ("\u200f\u2028\u061c", r"\u200f\u2028\u061c"),
        ("\udcff.csv", r"\udcff.csv"),
        ("a line\n\tand another: näïve, 日本, 👍, עברית", "a line\n\tand another: näïve, 日本, 👍, עברית"),
    ],
    ids=["a terminal's", "carriage return", "C0", "directions", "no UTF-8", "text"],
)
def test_controls_are_escaped_and_text_stays(text, shown):
    assert visible(text) == shown
    assert not RAW.search(visible(text))


def test_a_line_a_text_a_table_and_a_group_are_all_shown(terminal):
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    terminal.print(HOSTILE)
    terminal.print(Text(HOSTILE), Group(HOSTILE, table))
    terminal.fail("error:", f"{HOSTILE}\nwrote nothing")
    said = terminal.file.getvalue()
    assert said.count(SHOWN) == 6, "whole in every place, in a cell too"
    assert f"\n{SHOWN.replace(BELL, '')}\n" in said, "Rich leaves a bell out of a Text"
    assert f"error: {SHOWN}\\nwrote nothing\n" in said
    assert not RAW.search(said)


def test_colours_of_our_own_pass(terminal, monkeypatch):
    monkeypatch.setattr(Terminal, "is_terminal", True)
    colourful = Terminal()
    colourful.file = io.StringIO()
    colourful.print(HOSTILE, style="bold red")
    assert colourful.file.getvalue() == f"\x1b[1;31m{SHOWN}\x1b[0m\n"


def test_what_is_logged_is_shown():
    record = logging.makeLogRecord({"msg": "%s is read as utf-8", "args": (HOSTILE,)})
    assert VisibleFormatter("%(message)s").format(record) == f"{SHOWN} is read as utf-8"


def test_a_bar_shows_the_name_of_its_file(capsys, monkeypatch):
    monkeypatch.setattr(Terminal, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "200")
    with progress(f"reading {HOSTILE}") as report:
        report(1, 1.0)
    assert f"reading {SHOWN}" in capsys.readouterr().err


def test_the_commands_show_labels_columns_and_names(tmp_path, capsys):
    frame = questions(60).rename(columns={"Title": HOSTILE})
    frame["OpenStatus"] = [HOSTILE if row % 2 else "open" for row in range(len(frame))]
    table, out = write_csv(tmp_path / f"{HOSTILE.replace('/', '')}.csv", frame), tmp_path / "out"
    options = ("--label-column", "OpenStatus", "--text-columns")
    assert run_command("prepare", table, "--out", out, *options, HOSTILE) == 0
    assert f"labels: {SHOWN} 30 (50.0%)" in capsys.readouterr().out
    assert run_command("prepare", table, "--out", out, *options, "Title") == 3
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert SHOWN in said, "the columns there are"
    assert not RAW.search(said)
    assert run_command("prepare", tmp_path / f"absent{HOSTILE}.csv", "--out", out) != 0
    assert run_command("prepare", table, "--out", out, "--seed", HOSTILE) == 2
    assert not RAW.search(capsys.readouterr().err)
