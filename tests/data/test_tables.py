from __future__ import annotations

import gzip
import json
import sys
import zipfile
from collections.abc import Iterator
from datetime import time, timedelta
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertforge.data import limits, tables
from bertforge.data.chunks import BadRow, Chunk
from bertforge.data.dialect import Dialect
from bertforge.data.tables import read_chunks
from bertforge.errors import DataError, MachineError

from .tables import questions, write_every_format


def read_all(source: Path | pd.DataFrame, chunk_rows: int = 3) -> tuple[pd.DataFrame, list[int], list[BadRow]]:
    chunks: list[Chunk] = list(read_chunks(source, chunk_rows))
    frame = pa.concat_tables([chunk.table for chunk in chunks]).to_pandas()
    return frame, np.concatenate([c.line for c in chunks]).tolist(), [bad for c in chunks for bad in c.bad]


def read_csv(folder: Path, content: str | bytes) -> tuple[pd.DataFrame, list[int], list[BadRow]]:
    path = folder / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_all(path)


def test_every_format_gives_the_same_strings(tmp_path: Path) -> None:
    expected = questions(10)
    for source in [*write_every_format(tmp_path, expected), expected]:
        frame, lines, bad = read_all(source)
        assert frame.astype(object).values.tolist() == expected.values.tolist(), source
        assert not bad
        assert lines == sorted(lines)


def test_chunks_of_a_frame_are_full_however_it_was_made() -> None:
    frame = questions(3).astype("string[pyarrow]")
    assert [len(chunk.line) for chunk in read_chunks(pd.concat([frame] * 3), 8)] == [8, 1]


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    _, lines, _ = read_csv(tmp_path, 'a,b\n1,"x\ny\r\nz"\n\n2,w\n')
    assert lines == [2, 6]


def test_the_last_chunk_says_it_is_done(tmp_path: Path) -> None:
    for path in write_every_format(tmp_path, questions(10)):
        shares = [chunk.done for chunk in read_chunks(path, 4)]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("broken", "kept", "reasons"),
    [
        pytest.param('2,"say "hi" now",z\n', ["1", "3"], ["broken quoting"], id="quote inside quotes"),
        pytest.param('2,"never closed,z\n', ["1", "3"], ["broken quoting"], id="unclosed, later quotes"),
        pytest.param("2,too few\n", ["1", "3"], ["2 fields instead of 3"], id="too few"),
        pytest.param("2,a,b,c\n", ["1", "3"], ["4 fields instead of 3"], id="too many"),
        pytest.param("2\n4\n", ["1", "3"], ["1 fields instead of 3"] * 2, id="two short rows are two"),
        pytest.param('2,"a"b,c\n4,"a"b,c\n', ["1", "3"], ["broken quoting"] * 2, id="two broken rows are two"),
        pytest.param('2,"a,c\n4,"a,c\n', ["1", "3"], ["broken quoting"] * 2, id="two unclosed rows are two"),
        pytest.param('2,"a\nb"c\nd\n\ne",f\n', ["1", "3"], ["broken quoting"], id="all lines of a torn row are one"),
        pytest.param('2,"a\nb",c,d\n', ["1", "3"], ["4 fields instead of 3"], id="long record with a field too many"),
    ],
)
def test_a_broken_csv_row_costs_itself_only(tmp_path: Path, broken: str, kept: list[str], reasons: list[str]) -> None:
    frame, lines, bad = read_csv(tmp_path, f'id,text,tag\n1,"good",x\n{broken}3,"also ""good""",y\n')
    assert frame["id"].tolist() == kept
    assert frame["text"].tolist() == ["good", 'also "good"']
    assert [row.reason.split(":")[0] for row in bad] == reasons
    assert bad[0].line == 3
    assert "".join(str(row.raw) for row in bad) == broken
    assert lines == [2, 3 + broken.count("\n")]


def test_broken_rows_are_told_apart_whatever_separates(tmp_path: Path) -> None:
    frame, _, bad = read_csv(tmp_path, 'id;text;tag\n1;good;x\n2;"a"b;c\n4;"a"b;c\n3;fine;y\n')
    assert frame["id"].tolist() == ["1", "3"]
    assert [row.line for row in bad] == [3, 4]


def test_an_unclosed_quote_at_the_end_of_the_file_costs_one_row(tmp_path: Path) -> None:
    rows = "".join(f"{i},text {i},x\n" for i in range(2000))
    frame, _, bad = read_csv(tmp_path, f'id,text,tag\n-1,"open,x\n{rows}')
    assert len(frame) == 2000
    assert [row.line for row in bad] == [2]


def test_a_long_field_is_read_and_a_far_longer_one_has_its_own_reason(tmp_path: Path) -> None:
    frame, _, bad = read_csv(tmp_path, f"id,text\n1,{'a' * 2_000_000}\n2,{'b' * 5_000_000}\n3,c\n")
    assert frame["id"].tolist() == ["1", "3"]
    assert len(frame["text"][0]) == 2_000_000
    assert [(row.line, row.reason.split(":")[0]) for row in bad] == [(3, "field of more than 4,194,304 characters")]


def test_a_table_of_nothing_but_bad_rows_comes_in_chunks_too(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "lonely\n" * 10)
    assert [len(chunk.bad) for chunk in read_chunks(path, 4)] == [4, 4, 2]


def test_wrong_encoding_is_set_aside_with_its_line(tmp_path: Path) -> None:
    frame, _, bad = read_csv(tmp_path, b"id,text\n1,fine\n2,caf\xe9\n3,caf\xc3\xa9\n")
    assert frame["text"].tolist() == ["fine", "café"]
    assert [(row.line, row.reason) for row in bad] == [(3, "not UTF-8")]
    assert bad[0].raw == {"id": "2", "text": "caf\udce9"}


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    frame, _, _ = read_csv(tmp_path, b"\xef\xbb\xbfid,text\r\n1,a\r\n")
    assert list(frame.columns) == ["id", "text"]
    assert frame["text"].tolist() == ["a"]


def test_json_lines_set_aside_what_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a": 1, "b": null}\n{"a": \n[1]\n{"a": 2.0, "b": "x"}\n\n{"a": "\xff"}\n{"a": true, "c": 1}\n')
    frame, lines, bad = read_all(path, chunk_rows=4)
    assert frame.values.tolist() == [["1", ""], ["2", "x"], ["true", ""]]
    assert lines == [1, 4, 7]
    assert [(row.line, row.reason) for row in bad] == [
        (2, "broken JSON"),
        (3, "not a JSON object"),
        (6, "not UTF-8"),
    ]
    assert bad[2].raw == '{"a": "\udcff"}'


def test_a_json_key_that_comes_late_is_left_out_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": "x"}\n' * 3 + '{"a": "y", "c": 1}\n' * 4)
    frame, lines, bad = read_all(path)
    assert frame.to_dict("list") == {"a": ["x"] * 3 + ["y"] * 4}
    assert (lines, bad) == ([*range(1, 8)], [])
    assert caplog.messages == [f"{path}: key 'c' of 4 rows is left out: it is not in the first 3 lines"]


def test_parquet_types_become_the_strings_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table(
        {
            "whole": pa.array([1.0, None]),
            "real": [1.5, float("nan")],
            "flag": [True, False],
            "when": pa.array([0, None], pa.timestamp("ms", tz="America/New_York")),
            "name": pa.array(["x", None]).dictionary_encode(),
            "list": [["a", "b"], None],
        }
    )
    pq.write_table(table, path)
    frame, lines, _ = read_all(path)
    assert frame.values.tolist()[0] == ["1", "1.5", "true", "1970-01-01 00:00:00.000", "x", '["a", "b"]']
    assert frame.values.tolist()[1] == ["", "", "false", "", "", ""]
    assert lines == [1, 2]


def test_a_parquet_column_of_bytes_is_absent_unless_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"text": pa.array([b"a", b"b"]), "image": [b"\x89PNG", b"\xff"], "y": ["0", "1"]})
    pq.write_table(table, path)
    (chunk,) = read_chunks(path, named=("text", "y"))
    assert chunk.table.to_pydict() == {"text": ["a", "b"], "y": ["0", "1"]}
    assert not chunk.bad


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table([["1"], ["2"], ["3"]], names=["a", "a", "b"]), path)
    with pytest.raises(DataError, match="two columns of one name: a; rename one"):
        read_all(path)


@pytest.mark.parametrize("declared", ["binary", "string"])
def test_parquet_text_that_is_no_utf8_is_set_aside(tmp_path: Path, declared: str) -> None:
    path = tmp_path / "t.parquet"
    column = pa.array([b"ok", b"\xff"])
    if declared == "string":  # Parquet writers may store any bytes under the name of text
        column = pa.Array.from_buffers(pa.string(), 2, column.buffers())
    pq.write_table(pa.table({"id": [1, 2], "text": column}), path)
    (chunk,) = read_chunks(path, named=("text",))
    assert chunk.table.to_pylist() == [{"id": "1", "text": "ok"}]
    assert [(row.line, row.reason) for row in chunk.bad] == [(2, "not UTF-8")]


def test_parquet_lists_that_hold_no_utf8_are_one_line_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    raw = pa.array([b"ok", b"\xff"])
    words = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"list": pa.ListArray.from_arrays([0, 1, 2], words)}), path)
    with pytest.raises(DataError, match=r"not a readable Parquet file .*can't decode byte 0xff"):
        read_all(path)


def test_a_header_alone_is_an_empty_chunk(tmp_path: Path) -> None:
    for path in write_every_format(tmp_path, questions(1).iloc[:0])[:3]:
        frame, _, _ = read_all(path)
        assert len(frame) == 0
        assert list(frame.columns) == list(questions(1).columns)


def _zip_of(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "a,b\n1,2\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xls", b"x", "unknown format '.xls'"),
        ("t.xlsx", b"x", "not a readable Excel"),
        ("t.csv", b"", "is empty"),
        ("t.csv", b"\na,b\n", "no header"),
        ("t.csv", b"a,a\n1,2\n", "names a column twice"),
        ("t.csv", "a,b\n1,2\n".encode("utf-16-le"), "header that is no text in its encoding; .*--encoding"),
        ("t.gz", b"x", r"does not say what it holds; name it like t.csv.gz"),
        ("t.csv.gz", b"x", "not a readable gz"),
        ("t.zip", b"PK", "not a readable zip"),
        ("t.parquet", b"PAR1", "not a readable Parquet"),
        ("t.json", b'[{"a": 1}]', "one JSON array"),
        ("t.jsonl", b"hello\n", "no JSON object"),
        ("t.jsonl", b'{"a\\ud800": 1}\n', r"key that is no text \(a lone surrogate\): 'a\\ud800'; rename it"),
    ],
)
def test_unreadable_files_are_one_line_errors(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


def test_a_zip_damaged_inside_is_an_error(tmp_path: Path) -> None:
    path = write_every_format(tmp_path, questions(2000))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100] = bytes(100)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="not a readable zip"):
        read_all(path, chunk_rows=100)


def test_missing_file_folder_and_ambiguous_zip_are_errors(tmp_path: Path) -> None:
    _zip_of(tmp_path / "two.zip", "a.csv", "b.csv")
    _zip_of(tmp_path / "mac.zip", "a.csv", "__MACOSX/a.csv")
    with pytest.raises(DataError, match="does not exist"):
        read_all(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_all(tmp_path)
    with pytest.raises(DataError, match="exactly one"):
        read_all(tmp_path / "two.zip")
    assert len(read_all(tmp_path / "mac.zip")[0]) == 1


TABLE = pd.DataFrame({"text": ["one; two", "naïve, “quoted”", "a\tb"], "label": ["x", "y", "x"]})


@pytest.mark.parametrize(
    ("name", "separator", "encoding", "said"),
    [
        ("t.csv", ";", "utf-8", ["columns separated by semicolons"]),
        ("t.tsv", "\t", "utf-8", []),
        ("t.txt", "|", "utf-8", ["columns separated by vertical bars"]),
        ("t.txt", "\t", "cp1252", ["Windows-1252, columns separated by tabs"]),
        ("t.csv", ",", "cp1252", ["Windows-1252"]),
        ("t.csv", ",", "utf-16", ["UTF-16"]),
        ("t.csv", ",", "utf-8-sig", []),
        ("t.csv.gz", ";", "utf-8", ["columns separated by semicolons"]),
        ("t.tsv.gz", "\t", "utf-8", []),
    ],
)
def test_separators_and_encodings_are_found_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, separator: str, encoding: str, said: list[str]
) -> None:
    path = tmp_path / name
    TABLE.to_csv(path, sep=separator, encoding=encoding, index=False)
    frame, lines, bad = read_all(path)
    assert (frame.values.tolist(), lines, bad) == (TABLE.values.tolist(), [2, 3, 4], [])
    assert caplog.messages == [f"{path} is read as {what}" for what in said]


def test_what_is_told_is_not_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("a,b;c\né,1;2\n".encode("cp1250"))
    (chunk,) = read_chunks(path, dialect=Dialect("cp1250", ";"))
    assert chunk.table.to_pylist() == [{"a,b": "é,1", "c": "2"}]
    assert not caplog.messages


def test_gzipped_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    TABLE.to_json(path, orient="records", lines=True)
    assert read_all(path)[0].values.tolist() == TABLE.values.tolist()


def test_a_cut_gzip_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    questions(2000).to_csv(path, index=False)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="not a readable gz file"):
        read_all(path)


def test_lone_carriage_returns_end_lines(tmp_path: Path) -> None:
    frame, lines, bad = read_csv(tmp_path, "a,b\r1,x\r2,y\r")
    assert (frame.values.tolist(), lines, bad) == ([["1", "x"], ["2", "y"]], [2, 3], [])


def test_columns_without_a_name_are_called_by_their_place(tmp_path: Path) -> None:
    frame, _, bad = read_csv(tmp_path, "v1,v2,,,\nham,hello,,,\nspam,win, now,,\n")
    assert list(frame.columns) == ["v1", "v2", "column 3", "column 4", "column 5"]
    assert frame["column 3"].tolist() == ["", " now"]
    assert not bad


def test_an_excel_workbook(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.xlsx"
    frame = pd.DataFrame(
        {
            "text": ["naïve", "7", None, "end"],
            "whole": [1, 2.0, None, 3],
            "flag": [True, False, None, True],
            "when": [pd.Timestamp("2020-01-02 03:04"), None, None, None],
        }
    )
    with pd.ExcelWriter(path) as writer:
        frame.to_excel(writer, sheet_name="mails", index=False)
        frame.to_excel(writer, sheet_name="more", index=False)
    chunks = list(read_chunks(path, 2))
    assert [chunk.table.to_pylist() for chunk in chunks] == [
        [
            {"text": "naïve", "whole": "1", "flag": "true", "when": "2020-01-02 03:04:00"},
            {"text": "7", "whole": "2", "flag": "false", "when": ""},
        ],
        [{"text": "end", "whole": "3", "flag": "true", "when": ""}],
    ]
    assert [chunk.line.tolist() for chunk in chunks] == [[2, 3], [5]]
    assert chunks[-1].done == 1.0
    assert chunks[0].declared_text == {"text"}
    assert caplog.messages == [f"{path}: the first of 2 sheets is read, 'mails'"]


def write_sheet(path: Path, *rows: list[object]) -> Path:
    """A workbook whose sheet does not say how wide it is, as other programs write them."""
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("mails")
    for row in rows:
        sheet.append(row)
    book.save(path)
    return path


def test_times_of_an_excel_sheet_have_no_quotes(tmp_path: Path) -> None:
    path = write_sheet(tmp_path / "t.xlsx", ["a", "b"], [timedelta(hours=30), time(7, 30)])
    assert read_all(path)[0].values.tolist() == [["1 day, 6:00:00", "07:30:00"]]


def test_a_row_of_an_excel_sheet_that_is_wider_than_the_header_is_set_aside(tmp_path: Path) -> None:
    path = write_sheet(tmp_path / "t.xlsx", ["a", "b"], ["1", "x", "lost"], ["2", "y", None], ["3"])
    frame, lines, bad = read_all(path)
    assert (frame.values.tolist(), lines) == ([["2", "y"], ["3", ""]], [3, 4])
    assert bad == [BadRow(2, "3 fields instead of 2", "1\tx\tlost")]


def test_a_damaged_excel_sheet_is_said_to_be_so(tmp_path: Path) -> None:
    whole = write_sheet(tmp_path / "whole.xlsx", ["a", "b"], *([f"{row}", "x"] for row in range(99)))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "t.xlsx", "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            copy.writestr(name, content[: len(content) // 2] if "sheet1" in name else content)
    with pytest.raises(DataError, match=r"t\.xlsx is not a readable Excel file"):
        read_all(tmp_path / "t.xlsx")
    assert len(read_all(whole)[0]) == 99


def test_an_encrypted_excel_file_is_said_to_be_so(tmp_path: Path) -> None:
    path = write_sheet(tmp_path / "t.xlsx", ["a", "b"], ["1", "x"])
    content = bytearray(path.read_bytes())
    start = -1
    while (start := content.find(b"PK\x01\x02", start + 1)) >= 0:
        content[start + 8] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"not a readable Excel file .*encrypted"):
        read_all(path)


def test_an_encoding_that_the_file_cannot_be_in_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("a,b\n1,x\n".encode("utf-16-le"))  # no mark says which byte of a letter comes first
    with pytest.raises(DataError, match=r"is not in the encoding named .*; name another with --encoding"):
        list(read_chunks(path, dialect=Dialect(encoding="utf-16")))
    (chunk,) = read_chunks(path, dialect=Dialect(encoding="utf-16-le"))
    assert chunk.table.to_pylist() == [{"a": "1", "b": "x"}]


def test_an_excel_workbook_without_openpyxl_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.xlsx"
    TABLE.to_excel(path, index=False)
    monkeypatch.setitem(sys.modules, "openpyxl", None)  # importing it now fails
    with pytest.raises(MachineError, match=r"pip install 'bertforge\[excel\]'"):
        read_all(path)


def test_an_excel_sheet_needs_a_header_of_different_names(tmp_path: Path) -> None:
    path = tmp_path / "t.xlsx"
    pd.DataFrame([["a", "a"], ["1", "2"]]).to_excel(path, index=False, header=False)
    with pytest.raises(DataError, match="names a column twice in its header: a"):
        read_all(path)
    pd.DataFrame().to_excel(path)
    with pytest.raises(DataError, match="no header"):
        read_all(path)


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, "gz"])
def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int | str
) -> None:
    monkeypatch.setattr(limits, "UNPACKED_BYTES", 1 << 20)
    for size, too_large in ((1_000_000, False), (3_000_000, True)):
        content = b"a,b\n1," + b"x" * size + b"\n"
        path = tmp_path / ("t.csv.gz" if method == "gz" else "t.csv.zip")
        if isinstance(method, str):
            path.write_bytes(gzip.compress(content))
        else:
            with zipfile.ZipFile(path, "w", method) as archive:
                archive.writestr("t.csv", content)
        if too_large:
            with pytest.raises(
                DataError, match=r"unpacks to more than 1,048,576 bytes, 100 times .*unpack it and name"
            ):
                read_all(path)
        else:
            assert len(read_all(path)[0]["b"][0]) == size


def test_a_parquet_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNPACKED_BYTES", 1 << 20)
    for rows, too_large in ((10, False), (1000, True)):
        words = pa.array(["long " * 10_000, "short"])
        text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), words)
        for column in (text, text.dictionary_decode()):
            pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet")
            if too_large:
                with pytest.raises(DataError, match=r"unpacks to more than 1,048,576 bytes"):
                    read_all(tmp_path / "t.parquet")
            else:
                assert read_all(tmp_path / "t.parquet")[0]["text"].tolist() == ["long " * 10_000] * rows


def test_a_long_text_that_a_dictionary_names_often_is_read_in_small_pieces(tmp_path: Path) -> None:
    longest = limits.CELL // 2
    words = pa.array(["x" * (2 * limits.CELL), "y" * longest])
    text = pa.DictionaryArray.from_arrays(pa.array([1] * 20 + [0], pa.int32()), words)
    pq.write_table(pa.table({"text": text}), tmp_path / "t.parquet", dictionary_pagesize_limit=1 << 30)
    chunks = list(read_chunks(tmp_path / "t.parquet"))
    assert max(chunk.table.nbytes for chunk in chunks) <= 2 * limits.CHUNK_CHARACTERS
    assert [len(text) for chunk in chunks for text in chunk.table["text"].to_pylist()] == [longest] * 20
    assert [(row.line, row.reason.split(":")[0]) for chunk in chunks for row in chunk.bad] == [
        (21, "field of more than 4,194,304 characters")
    ]


def test_few_rows_are_read_at_once_where_a_dictionary_holds_a_long_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CELL", 1000)
    sizes: list[int] = []
    check = tables._within_limit

    def watched(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[pa.RecordBatch]:
        for batch in check(batches, path):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(tables, "_within_limit", watched)
    for longest in (10, 8000):
        text = pa.array(["x" * longest, "y"] * 100)
        pq.write_table(pa.table({"text": text}), tmp_path / "t.parquet")
        assert sum(len(chunk.line) + len(chunk.bad) for chunk in read_chunks(tmp_path / "t.parquet")) == 200
        assert max(sizes) < 64 * limits.CELL
        assert len(sizes) == 4 if longest == 10 else len(sizes) > 20
        sizes.clear()


def test_an_excel_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sheet(tmp_path / "t.xlsx", ["a", "b"], ["x" * 20_000, "y"])
    assert len(read_all(path)[0]) == 1
    monkeypatch.setattr(limits, "WORKBOOK_BYTES", 20_000)
    with pytest.raises(DataError, match=r"unpacks to [\d,]+ bytes, more than the 20,000 .*; save the sheet as CSV"):
        read_all(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (b'<row r="999999999999"><c r="A1"><v>1</v></c></row>', "more than 1,048,576 rows"),
        (b'<row><c r="XFD1"><v>1</v></c></row>' * 300, "much beside its columns"),
    ],
)
def test_an_excel_sheet_of_far_cells_is_refused(tmp_path: Path, more: bytes, message: str) -> None:
    whole = write_sheet(tmp_path / "whole.xlsx", ["a", "b"], ["1", "x"])
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "t.xlsx", "w") as copy:
        for name in source.namelist():
            copy.writestr(name, source.read(name).replace(b"</sheetData>", more + b"</sheetData>"))
    with pytest.raises(DataError, match=f"{message}; save the sheet as CSV"):
        read_all(tmp_path / "t.xlsx")


def test_a_long_cell_is_set_aside_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CELL", 1000)
    frame = pd.DataFrame({"id": ["1", "2", "3"], "text": ["é" * 1000, "é" * 1001, "short"]})
    frame.to_excel(tmp_path / "t.xlsx", index=False)
    for source in [*write_every_format(tmp_path, frame), tmp_path / "t.xlsx", frame]:
        read, _, bad = read_all(source)
        assert read["id"].tolist() == ["1", "3"], source
        assert [row.reason.split(":")[0] for row in bad] == ["field of more than 1,000 characters"], source


def test_a_long_line_of_json_is_set_aside_and_the_next_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ROW", 1000)
    path = tmp_path / "t.jsonl"
    rows = [{"a": "x"}, {"a": "y" * 5000}, {"a": "z" * 900}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame, lines, bad = read_all(path)
    assert frame["a"].tolist() == ["x", "z" * 900]
    assert lines == [1, 3]
    assert [(row.line, row.reason.split(":")[0]) for row in bad] == [(2, "row of more than 1,000 characters")]


def written(frame: pd.DataFrame, path: Path) -> Path:
    """In the format of its name; of Parquet, five rows a group."""
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        frame.to_parquet(path, row_group_size=5)
    else:
        frame.to_excel(path, index=False)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.xlsx"])
def test_chunks_end_at_their_characters_and_their_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    frame = pd.DataFrame({f"c{column}": ["x" * 100] * 50 for column in range(10)})
    path = written(frame, tmp_path / name)
    assert [len(chunk.line) for chunk in read_chunks(path)] in ([50], [50, 0])
    monkeypatch.setattr(limits, "CHUNK_CHARACTERS", 10_000)
    sizes = [len(chunk.line) for chunk in read_chunks(path)]
    assert sum(sizes) == 50
    assert max(sizes) <= 11
    monkeypatch.setattr(limits, "CHUNK_CELLS", 30)
    sizes = [len(chunk.line) for chunk in read_chunks(path)]
    assert sum(sizes) == 50
    assert max(sizes) == 3


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.xlsx"])
def test_too_many_columns_and_too_long_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(limits, "COLUMNS", 3)
    monkeypatch.setattr(limits, "NAME", 20)

    def read(names: list[str]) -> int:
        frame = pd.DataFrame([["1"] * len(names)], columns=names)
        return len(read_all(written(frame, tmp_path / name))[0].columns)

    assert read(["a", "b", "c" * 20]) == 3
    with pytest.raises(DataError, match="has 4 columns; a table may have 3: take out"):
        read(["a", "b", "c", "d"])
    with pytest.raises(DataError, match=r"column 2 of .* has a name of 21 characters, 'bbbbbbbbbbbbbbbbbbbb'\.\.\."):
        read(["a", "b" * 21])


def test_blank_lines_of_json_end_no_table(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": "x"}\n' + "\n" * 50 + '{"a": "y"}\n')
    assert read_all(tmp_path / "t.jsonl")[1] == [1, 52]


def test_json_too_deep_to_read_or_to_write_is_broken(tmp_path: Path) -> None:
    rows = ['{"a": ' + "[" * depth + "]" * depth + "}" for depth in (1, 500, 900, 980, 1100, 100_000)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    _, lines, bad = read_all(tmp_path / "t.jsonl")
    assert sorted([*lines, *(row.line for row in bad)]) == [1, 2, 3, 4, 5, 6]
    assert {row.reason for row in bad} == {"broken JSON"}
    assert lines[0] == 1


def test_late_keys_of_json_are_named_up_to_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ['{"a": "x"}'] * 3 + [json.dumps({"a": "x", f"k{number}": 1}) for number in range(100)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    read_all(tmp_path / "t.jsonl")
    assert len(caplog.messages) == 21
    assert "every other late key of 80 rows is left out" in caplog.messages[0]


def test_a_file_that_is_no_such_table_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNREADABLE_LINES", 20)
    path = tmp_path / "t.csv"
    for bad, good in (("x\n" * 21, 21), ('x,"y' + "\ny" * 21, 22), ("x\n" * 19, 0)):
        path.write_text("a,b\n" + "1,2\n" * good + bad)
        rows, _, aside = read_all(path)
        assert len(rows) == good
        assert aside
    for bad, reason in (("x\n" * 30, "1 fields instead of 2"), ('x,"y' + "\ny" * 30, "broken quoting")):
        path.write_text("a,b\n" + "1,2\n" * 20 + bad)
        with pytest.raises(DataError, match=rf"lines of .* cannot be read, and 20 rows can; line \d+ has: {reason}"):
            read_all(path)
