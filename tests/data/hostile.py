"""Tables as no one should write them: broken, mixed up, cut off, packed to burst. Small, seeded and endless.

Each has columns `text` and `label`. Whatever it is, `prepare` must end in bounded time either with as many rows kept
and set aside as the table has, or with an error of one line. `tests/data/test_hostile.py` runs some dozens;
`benchmarks/faults.py` runs as many as one asks for.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import cycle
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq

Table = tuple[str, bytes, int | None]
"""A file's name, what is in it, and how many rows that is; None where it cannot be said."""

_WORDS = [
    "how",
    "do",
    "I",
    "sort",
    "naïve",
    "列表",
    "“quoted”",
    "=1+1",
    "a,b",
    "x;y",
    "🙂",
    "it's",
    "1e999",
    "-0",
    "NaN",
]
_CONTROLS = ["\0", "\x07", "\x1b[2J", "\x85", "\u200b", "\u202e", "\ufeff", "\ufffe", "e\u0301\u0301", "\t", "\v\f"]
_LONG = [
    lambda r, unit=unit: unit * r.choice([99, 101, 1025, 20_000])
    for unit in ("a", ".", " ", "中", "é", "\u0301", "[", "]")
]
_LABELS = ["spam", "ham", "=ham", "@x", "spam ", "0", "true"]


def hostile_tables(seed: int) -> Iterator[Table]:
    """Tables without end: every kind in turn, each time made by other draws."""
    rng = random.Random(seed)
    for number, make in enumerate(cycle(KINDS)):
        name, content, rows = make(rng)
        yield f"{number:04}-{make.__name__.strip('_')}-{name}", content, rows


def _text(rng: random.Random) -> str:
    """Never blank, and hardly ever the same twice."""
    words = [f"w{rng.randrange(10**9)}", *rng.choices(_WORDS, k=rng.randint(1, 9))]
    if rng.random() < 0.2:
        words.append(rng.choice(_CONTROLS))
    if rng.random() < 0.1:
        words.append(rng.choice(_LONG)(rng))
    rng.shuffle(words)
    return " ".join(words)


def _rows(rng: random.Random) -> list[tuple[str, str]]:
    return [
        (_text(rng), rng.choice(_LABELS[:2] if rng.random() < 0.8 else _LABELS)) for _ in range(rng.randint(20, 60))
    ]


def _quoted(field: str) -> str:
    return '"' + field.replace('"', '""') + '"'


# ------------------------------------------------------------------------------------------- text


def _rows_of_all_kinds(rng: random.Random) -> Table:
    """Quotes in pairs, so that what is a row can be said."""
    end = rng.choice(["\n", "\r\n"])
    lines, count = ["text,label,more"], 0
    for text, label in _rows(rng):
        good = f"{_quoted(text)},{label},"
        line = rng.choices(
            [
                good,
                f"{_quoted(text + end + 'second, line' + chr(13) + 'third')},{label},x",
                f"{_quoted(text)}\r,{label},",  # a carriage return outside quotes
                f"lone\rreturn {rng.random()},{label},",
                f"{_quoted(text)},{label}",  # too few
                f"{_quoted(text)},{label},,,",  # too many
                f",{label},no text",
                f"{_quoted(text)},,no label",
                f"{_quoted(text)},{'l' * 2000},long label",
            ],
            weights=[12, 2, 1, 1, 1, 1, 1, 1, 1],
        )[0]
        lines.append(line)
        count += 1
        lines += [""] * (rng.random() < 0.1)
    content = end.join(lines).encode() + rng.choice([b"", end.encode()])
    if rng.random() < 0.2:
        content = b"\xef\xbb\xbf" + content
    return *_packed(rng, "t.csv", content), count


def _broken_letters(rng: random.Random) -> Table:
    encoding = rng.choice(["cp1252", "utf-8", "utf-16", "utf-32"])
    lines = [f"w{rng.randrange(10**9)} café,{rng.choice(_LABELS[:2])}" for _ in range(rng.randint(20, 60))]
    content = "\n".join(["text,label", *lines]).encode(encoding)
    if encoding == "utf-8":
        content = content.replace("é".encode(), b"\xe9", rng.randint(1, 3))
    return "t.csv", content, len(lines)


def _soup(rng: random.Random) -> Table:
    """Quotes, separators and ends of lines as they come."""
    units = rng.choice([['"', ",", "\n", "x"], ['x","\n', "a,b\n", '"\n', '""'], ["\r", "\n", ",", '"', "x", "\0"]])
    body = "".join(rng.choices(units, k=rng.randint(1, 3000)))
    return *_packed(rng, "t.csv", f"text,label\n{body}".encode()), None


def _quotes_that_open_again(rng: random.Random) -> Table:
    """Quadratic time for a reader that looks for the end of each."""
    end = rng.choice(["", '"\n', '"a\n'])
    return "t.csv", b"text,label\n" + b'x","\n' * rng.randint(1000, 20_000) + end.encode(), None


def _noise(rng: random.Random) -> Table:
    head = rng.choice([b"", b"text,label\n", b'{"text": "a", "label": "b"}\n', b"PAR1", b"PK\x03\x04", b"\x1f\x8b\x08"])
    name = rng.choice(["t.csv", "t.tsv", "t.jsonl", "t.csv.gz", "t.csv.zip", "t.parquet", "t.xlsx", "t.txt"])
    return name, head + rng.randbytes(rng.randint(1, 3000)), None


def _headers(rng: random.Random) -> Table:
    header = rng.choice(
        [
            *(
                ",".join(f"c{i}" for i in range(5000)),
                "text,label," + "x" * 2000,
                "text,label,text",
                ",,",
                '"text,label',
            ),
            *(
                "text,label" + "," * 100_000,
                "text\0,label",
                "text\rlabel",
                "",
                '"te""xt",label',
                "text,label" + ",a" * 50,
            ),
        ]
    )
    return "t.csv", "\n".join([header, *(f"{text},{label}" for text, label in _rows(rng))]).encode(), None


def _long_lines(rng: random.Random) -> Table:
    unit = rng.choice([b",", b"a", b'"', b'""', b"\0", b"\r", b"a\r", b'a,"b",', b" "])
    good = b"".join(f"w{i} text,{_LABELS[i % 2]}\n".encode() for i in range(30))
    return "t.csv", b"text,label\n" + good + unit * rng.randint(1, 300_000) + b"\n" + good, None


def _json_lines(rng: random.Random) -> Table:
    lines: list[bytes] = []
    for text, label in _rows(rng):
        row: dict[str, Any] = {"text": text, "label": label}
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5)
        lines.append(
            rng.choices(
                [
                    line.encode("utf-8", "surrogatepass"),
                    json.dumps({**row, f"k{rng.randrange(10**6)}": [{}, None, 1e300, [text]]}).encode(),
                    *(
                        line[: len(line) // 2].encode("utf-8", "ignore"),
                        b"[]",
                        b"null",
                        b"1" * 5000,
                        b"\xff" + line.encode(),
                    ),
                    *(b'{"text": ' + b"[" * 100_000, b'{"text": ' + b'{"a":' * 900 + b"1" + b"}" * 901),
                    *(
                        b'{"text": "\\ud800", "label": "ham"}',
                        b'{"text": 1e999, "label": NaN}',
                        b'{"text": [], "label": {}}',
                    ),
                ],
                weights=[30, 3, *[1] * 10],
            )[0]
        )
    count = len(lines)
    lines.insert(1, b" ")
    return *_packed(rng, "t.jsonl", b"\n".join(lines)), count


# --------------------------------------------------------------------------------- packed, damaged


def _packed(rng: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    how = rng.choice(["", "", "", ".gz", ".zip"])
    if how == ".gz":
        half = len(content) // 2
        return name + how, gzip.compress(content[:half]) + gzip.compress(content[half:])  # two members are one file
    if how == ".zip":
        method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        return name + how, _zip({name: content}, method)
    return name, content


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _bombs(rng: random.Random) -> Table:
    """A hundred kilobytes that unpack to a hundred megabytes."""
    unit = rng.choice([b"a", b"a,b\n", b'x","\n', b"\n", b'"'])
    content = b"text,label\n" + unit * (100_000_000 // len(unit))
    if rng.random() < 0.5:
        return "t.csv.gz", gzip.compress(content, 1), None
    return "t.csv.zip", _zip({"t.csv": content}, rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])), None


def _zips_that_lie(rng: random.Random) -> Table:
    table = "\n".join(["text,label", *(f"{_quoted(text)},{label}" for text, label in _rows(rng))]).encode()
    if rng.random() < 0.3:
        members = {f"{i}.csv": table for i in range(rng.choice([0, 2, 300]))} | {"../../t.txt": b"x", "d/": b""}
        return "t.zip", _zip(members), None
    content = bytearray(_zip({"t.csv": table}))
    start = content.rindex(b"PK\x01\x02")  # of the directory: flags at 8, method 10, checksum 16, sizes 20, 24, name 28
    at, width = rng.choice([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)])
    content[start + at : start + at + width] = rng.choice([b"\xff" * width, bytes(width), rng.randbytes(width)])
    return "t.csv.zip", bytes(content), None


def _damaged(rng: random.Random) -> Table:
    """Cut off, or some bytes other than they were."""
    name, whole, _ = rng.choice([_json_lines, _rows_of_all_kinds, _parquet, _workbook])(rng)
    content = bytearray(whole)
    if rng.random() < 0.3:
        return name, bytes(content[: rng.randrange(1, len(content))]), None
    for _ in range(rng.randint(1, 20)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return name, bytes(content), None


# --------------------------------------------------------------------------------- Parquet, Excel


def _parquet(rng: random.Random) -> Table:
    rows = _rows(rng)
    texts, labels = (list(column) for column in zip(*rows, strict=True))
    others: dict[str, Any] = {
        "when": pa.array([rng.choice([0, None, 2**62]) for _ in rows], pa.timestamp(rng.choice(["ms", "ns"]))),
        "list": [[{"a": text}] for text in texts],
        "huge": pa.array([rng.choice([1e308, float("nan"), float("-inf")]) for _ in rows]),
        "blob": pa.array([rng.randbytes(5) for _ in rows]),
        "nothing": pa.nulls(len(rows)),
        "span": pa.array([rng.randrange(10**12) for _ in rows], pa.duration("us")),
    }
    text = pa.array([rng.choice([text, text, None]) for text in texts])
    if rng.random() < 0.4:  # bytes that are no text under the name of text
        raw = pa.array([rng.choice([text.encode(), b"\xff\xfe"]) for text in texts])
        text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    table = {"text": text.dictionary_encode() if rng.random() < 0.2 else text, "label": pa.array(labels)}
    table |= {name: others[name] for name in rng.sample(sorted(others), k=3)}
    file = io.BytesIO()
    compression = rng.choice(["none", "zstd", "snappy", "gzip"])
    pq.write_table(pa.table(table), file, row_group_size=rng.choice([1, 7, 1000]), compression=compression)
    return "t.parquet", file.getvalue(), len(rows)


def _parquet_dictionaries(rng: random.Random) -> Table:
    """One long text, named by all rows."""
    rows = rng.choice([50, 2000])
    words = pa.array(["a " * rng.choice([1000, 500_000]), "b c"])
    codes = pa.array([rng.randrange(2) for _ in range(rows)], pa.int32())
    table = pa.table({"text": pa.DictionaryArray.from_arrays(codes, words), "label": ["x", "y"] * (rows // 2)})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", dictionary_pagesize_limit=1 << 30)
    return "t.parquet", file.getvalue(), rows


def _workbook(rng: random.Random) -> Table:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["text", "label"])
    rows = _rows(rng)
    for text, label in rows:
        clean = "".join(letter for letter in text if letter.isprintable())[:30_000].lstrip("=")  # no formula
        more = rng.choice([None, None, None, 1e300, True, datetime(2020, 1, 1), timedelta(hours=30), "=1/0", "#REF!"])
        sheet.append([rng.choice([clean, clean, clean, 7, datetime(1900, 1, 1)]), label, *([more] if more else [])])
    file = io.BytesIO()
    book.save(file)
    return "t.xlsx", file.getvalue(), len(rows)


def _workbooks_that_lie(rng: random.Random) -> Table:
    """Cells far away, rows without end, and parts that unpack to a hundred megabytes."""
    _, whole, _ = _workbook(rng)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet, strings, kinds = "xl/worksheets/sheet1.xml", "xl/sharedStrings.xml", "[Content_Types].xml"
    kind = b"application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    part = b'<Override PartName="/xl/sharedStrings.xml" ContentType="' + kind + b'"/></Types>'
    parts[kinds] = parts[kinds].replace(b"</Types>", part)
    space = b"xmlns='http://schemas.openxmlformats.org/spreadsheetml/2006/main'"
    parts[strings] = b"<sst " + space + b"><si><t>x</t></si></sst>"
    row, cell = rng.choice([(1_048_576, "XFD1048576"), (10**15, "A1"), (5, "ZZZZZZ5"), (-1, "A-1")])
    bomb = b"<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>" + b"".join(
        f"<!ENTITY {chr(98 + i)} '{f'&{chr(97 + i)};' * 10}'>".encode() for i in range(9)
    )
    changed = {
        sheet: rng.choice(
            [
                parts[sheet].replace(
                    b"</sheetData>", b'<row r="%d"><c r="%s"/></row></sheetData>' % (row, cell.encode())
                ),
                parts[sheet].replace(b"</sheetData>", b"<row><c r='XFD1'><v>1</v></c></row>" * 2000 + b"</sheetData>"),
                parts[sheet].replace(b"<sheetData>", b"<sheetData>" + b"<row>" * 10_000),
            ]
        ),
        strings: rng.choice(
            [
                parts[strings].replace(b"</sst>", b"<si><t>" + b"a" * 100_000_000 + b"</t></si></sst>"),
                bomb + b"]><sst " + space + b"><si><t>&j;</t></si></sst>",
                b"",
            ]
        ),
    }
    which = rng.choice([sheet, strings, *sorted(parts)])
    broken = bytearray(parts[which])
    for _ in range(3):
        broken[rng.randrange(len(broken))] = rng.randrange(32, 127)
    return "t.xlsx", _zip(parts | {which: changed.get(which, bytes(broken))}), None


KINDS: tuple[Callable[[random.Random], Table], ...] = (
    *(_rows_of_all_kinds, _broken_letters, _soup, _quotes_that_open_again, _noise, _headers, _long_lines, _json_lines),
    *(_bombs, _zips_that_lie, _damaged, _parquet, _parquet_dictionaries, _workbook, _workbooks_that_lie),
)
