"""Broken quoting costs a row and no time: what is known of a record's end is what reading up to it would have shown."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from bertforge.data import csv_records, limits
from bertforge.data.csv_records import CsvRecords, Record

SOUPS = [['"', ",", "\n", "x"], ['x","\n', 'a,"b\nc"\n', '",\n', ",x"], ['"', '""', "\n", ",", '"x",y\n']]


def read(lines: list[str]) -> list[Record]:
    return list(CsvRecords(iter(lines), "t"))


def soup(seed: int) -> list[str]:
    draws = random.Random(seed)
    header = ",".join("abcd"[: draws.randint(1, 4)]) + "\n"
    return (header + "".join(draws.choices(draws.choice(SOUPS), k=draws.randint(1, 80)))).splitlines(keepends=True)


def test_what_is_known_of_an_end_is_what_reading_up_to_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    known_ends = 0
    check = csv_records._Lines._check_end

    def counted(lines: csv_records._Lines) -> None:
        nonlocal known_ends
        known_ends += 1
        check(lines)
        known_ends -= 1

    monkeypatch.setattr(csv_records._Lines, "_check_end", counted)
    tables = [soup(seed) for seed in range(1500)]
    found = [read(lines) for lines in tables]
    assert known_ends > 1000
    monkeypatch.setattr(csv_records._Lines, "_check_end", lambda lines: None)
    assert [read(lines) for lines in tables] == found


@pytest.mark.parametrize("last", ["", '"\n', '"a\n'], ids=["unclosed", "closed", "broken"])
def test_quotes_that_open_again_and_again_are_read_in_linear_time(monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    taken = 0
    take = csv_records._Lines.__next__

    def counted(lines: csv_records._Lines) -> str:
        nonlocal taken
        taken += 1
        return take(lines)

    monkeypatch.setattr(csv_records._Lines, "__next__", counted)
    lines = ["a,b\n"] + ['x","\n'] * 500 + [last]
    read(lines)
    assert taken <= 4 * len(lines)
    monkeypatch.setattr(csv_records._Lines, "_check_end", lambda lines: None)
    read(lines)
    assert taken > 100 * len(lines), "these lines are no trouble: the test shows nothing"


def test_a_carriage_return_outside_quotes_costs_its_own_line_only() -> None:
    lines = ["a,b\n", "1,x\n", "2,lone\rreturn\n", "3\n", '4,"in\rquotes"\n', '"5"\r,y\n', "\r\n", "6,end\r\n"]
    found = [(r.line, r.fields, r.problem.split(":")[0]) for r in read(lines)]
    assert found == [
        (2, ["1", "x"], ""),
        (3, [], "carriage return outside quotes"),
        (4, [], "1 fields instead of 2"),
        (5, ["4", "in\rquotes"], ""),
        (6, [], "carriage return outside quotes"),
        (8, ["6", "end"], ""),
    ]


def test_a_row_over_the_limit_is_set_aside_and_the_next_ones_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROW", 100)

    def lines() -> Iterator[str]:
        yield from ["a,b\n", "1,x\n", '2,"never closed\n']
        yield from (f"{row},y\n" for row in range(3, 60))
        yield "z" * 101  # cut off by bounded_lines
        yield "60,y\n"

    records = list(CsvRecords(lines(), "t"))
    assert [r.fields[0] for r in records if not r.problem] == ["1", *map(str, range(3, 61))]
    assert [(r.line, r.problem.split(" of")[0]) for r in records if r.problem] == [(3, "row"), (61, "row")]
