"""How a text table is written: its encoding, its line ends and the separator of its columns, told or detected.

**Encoding.** One pass over all bytes, for one Latin-1 letter in the last row is as wrong as one in the first. Text that
is UTF-8 in every line is UTF-8: other encodings fail that test almost surely. Where lines fail, the file is still UTF-8
with broken rows if some lines hold valid letters of UTF-8 and the broken ones are under 1%, or fewer than the valid
ones; those rows are set aside one by one. Else the broken lines decide. Where few of their characters are not ASCII
they are English, or another Western language, with a sign or an accent here and there: Windows-1252, of which Latin-1
is a part. On such lines charset-normalizer errs; it is asked about all others, and Windows-1252 wins a tie.

**Separator.** Of those that stand in the header, the one that cuts most of the first rows into as many fields as the
header, and then the one that makes most columns. Commas win a tie. `csv.Sniffer` finds the same in tables of several
columns, but says "?" of one column of questions, and fails there when it may choose among these four only.

**Line ends.** A file with carriage returns and no line feed (old Macintosh) is cut at those.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO

from bertforge.errors import UsageError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
UTF8, WESTERN = "utf-8-sig", "cp1252"  # the first drops a byte order mark where there is one
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before UTF-16, with whose mark one begins
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_OTHERS = (  # encodings that tables are still written in; left the choice of all, charset-normalizer finds MS-DOS
    *("cp1250", "cp1251", WESTERN, "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874"),
    *("koi8_r", "cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
_BLOCK = 1 << 20  # bytes read at once
_LONGEST_LINE = 16 << 20  # bytes of a line that is looked at whole
_SAMPLE = 1 << 16  # bytes of broken lines from which the encoding is told, and characters for the separator
_BROKEN = 0.01  # share of lines of a UTF-8 file that may be broken
_ACCENTS = 0.05  # share of the broken lines' characters: below it they are of a Western language
_HEAD_ROWS = 100
_NOT_ASCII = ("utf-16", "utf_16", "utf-32", "utf_32", "iso2022", "hz")  # whose bytes below 128 are no letters
_NOT_ASCII_LINE = re.compile(rb"[\x80-\xff][^\n]*")


@dataclass(frozen=True)
class Dialect:
    """What a user says of a text table; what is "" is detected."""

    encoding: str = ""
    """A name that Python knows, such as cp1252."""
    separator: str = ""
    """One character."""

    def __post_init__(self) -> None:
        if self.separator and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise UsageError(f"--separator {self.separator!r} is not one character; write ',', ';', '|' or tab")
        try:
            "".encode(self.codec or "utf-8")  # fails for codecs that are no text's, such as hex, too
        except (LookupError, UnicodeError):
            raise UsageError(
                f"--encoding {self.encoding!r} is unknown; write utf-8, cp1252 (Windows, Latin-1), utf-16 or the like"
            ) from None

    @property
    def codec(self) -> str:
        """Python's own name of the encoding, "" where none was told."""
        name = codecs.lookup(self.encoding).name if self.encoding else ""
        return UTF8 if name == "utf-8" else name


def encoding_name(encoding: str) -> str:
    """As people write it."""
    return re.sub(r"^CP125(\d)$", r"Windows-125\1", encoding.removesuffix("-sig").replace("_", "-").upper())


def detect_encoding(stream: IO[bytes]) -> str:
    """The encoding of everything in `stream`, as Python names it."""
    lines = valid = broken = 0  # valid: lines with letters that are UTF-8 and not ASCII
    sample = b""
    for number, block in enumerate(_blocks(stream)):
        if number == 0 and (found := [name for mark, name in _MARKS.items() if block.startswith(mark)]):
            return found[0]
        lines += block.count(b"\n") or block.count(b"\r")
        if block.isascii():
            continue
        among = [block] if _is_utf8(block) else block.splitlines(keepends=True)
        for piece in among:
            if _is_utf8(piece):
                valid += sum(1 for _ in _NOT_ASCII_LINE.finditer(piece))
            else:
                broken += 1
                sample += piece if len(sample) < _SAMPLE else b""  # whole lines: no letter of two bytes is cut
    if not broken or (valid and (broken < _BROKEN * lines or broken <= valid)):
        return UTF8
    return _encoding_of(sample)


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Pieces that end with a line; a line longer than `_LONGEST_LINE` is cut."""
    rest = b""
    while piece := stream.read(_BLOCK):
        rest += piece
        end = rest.rfind(b"\n") + 1 or rest.rfind(b"\r") + 1
        if not end and len(rest) < _LONGEST_LINE:
            continue
        end = end or len(rest)
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _encoding_of(lines: bytes) -> str:
    """The encoding of lines that are no UTF-8."""
    accents = sum(byte >= 0x80 for byte in lines)
    if accents < _ACCENTS * len(lines):
        return WESTERN
    from charset_normalizer import from_bytes

    found = from_bytes(lines, cp_isolation=list(_OTHERS))
    best = found.best()
    if best is None:
        return WESTERN
    as_likely = [match for match in found if match.coherence >= best.coherence and match.chaos <= best.chaos + 0.05]
    return WESTERN if any(WESTERN in match.could_be_from_charset for match in as_likely) else best.encoding


def open_text(stream: IO[bytes], encoding: str, newline: str) -> io.TextIOWrapper:
    """Lines of text; bytes that are not of the encoding become lone surrogates, so a row can be set aside whole."""
    escapes = not encoding.startswith(_NOT_ASCII)
    return io.TextIOWrapper(stream, encoding, "surrogateescape" if escapes else "replace", newline)


def read_head(stream: IO[bytes], encoding: str) -> str:
    """The first `_SAMPLE` characters, line ends as they are."""
    return open_text(stream, encoding, "").read(_SAMPLE)


def detect_newline(head: str) -> str:
    """What ends a line, as `open` takes it; the carriage return of a pair is left to the reader."""
    return "\r" if "\r" in head and "\n" not in head else "\n"


def detect_separator(head: str, newline: str, first: str = ",") -> str:
    """The separator of the table that begins with `head`; `first` where none stands in its header."""
    lines = head.split(newline)
    lines = [line + newline for line in lines[: max(1, len(lines) - 1)]]  # the last may be cut
    best, separator = (0.0, 0), first
    for candidate in dict.fromkeys([first, *SEPARATORS]):
        try:
            header, *rows = filter(None, islice(csv.reader(lines, delimiter=candidate), _HEAD_ROWS))
        except (csv.Error, ValueError):  # not CSV, or no row at all
            continue
        alike = sum(len(row) == len(header) for row in rows) / max(1, len(rows))
        if len(header) > 1 and (alike, len(header)) > best:
            best, separator = (alike, len(header)), candidate
    return separator
