"""Whatever a file holds, no row of it is lost, and what cannot be read is said in one line."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from bertforge.data.prepare import PrepareOptions, prepare
from bertforge.data.tokens import Tokenizer
from bertforge.errors import BertforgeError

from .hostile import KINDS, hostile_tables

OPTIONS = PrepareOptions(text_columns=("text",), label_column="label")


def test_every_row_is_kept_or_set_aside_or_the_error_is_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    counted = 0
    for name, content, expected in islice(hostile_tables(1), 2 * len(KINDS)):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            data = prepare(path, tmp_path / f"{name}.out", tokenizer, OPTIONS)
        except BertforgeError as refused:
            said = str(refused)
        else:
            said = ""
            rows = len(data) + sum(reason["rows"] for reason in data.manifest["set_aside"].values())
            set_aside = (data.directory / "set_aside.jsonl").read_text().splitlines()
            assert rows == len(data) + len(set_aside), name
            assert expected is None or rows == expected, name
            counted += expected is not None
        assert "\n" not in said, name
        assert len(said) < 2000, name
    assert counted > 5, "most tables were refused, so that no row was counted"
