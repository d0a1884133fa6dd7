from __future__ import annotations

import io

import pytest

from bertforge.data.lines import bounded_lines


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_short_lines_come_whole_and_of_a_longer_one_the_start(end: str) -> None:
    lines = ["a", "b" * 10, "", "c" * 11, "d" * 9, "e" * 1000, "\t", "f" * 95, "g"]
    text = io.TextIOWrapper(io.BytesIO(end.join(lines).encode()), newline=end)
    found = list(bounded_lines(text, 10, end))
    assert [line.rstrip(end)[:10] for line in found] == [line[:10] for line in lines]
    assert [len(line) > 10 for line in found] == [len(line) > 9 for line in lines]
    assert max(map(len, found)) == 11


def test_a_carriage_return_in_a_long_line_does_not_end_it() -> None:
    text = io.TextIOWrapper(io.BytesIO(b"a" * 10 + b"\r" + b"b" * 21 + b"\r" + b"c" * 30 + b"\nnext\n"), newline="\n")
    assert list(bounded_lines(text, 10)) == ["a" * 10 + "\r", "next\n"]
