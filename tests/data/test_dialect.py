from __future__ import annotations

import io

import pytest

from bertforge.data import dialect as module
from bertforge.data.dialect import UTF8, Dialect, detect_encoding, detect_newline, detect_separator, encoding_name
from bertforge.errors import UsageError

LANGUAGES = {
    "English": ("I don’t know – it costs £5.", "cp1252"),
    "German": ("Die Größe der Tür wäre schön gewesen, aber der Käufer möchte zurücktreten.", "cp1252"),
    "French": ("Le café était fermé à cause des élections, où êtes-vous allés déjeuner?", "latin-1"),
    "Polish": ("Zażółć gęślą jaźń. Proszę o zwrot pieniędzy, ponieważ przesyłka nie dotarła na czas.", "cp1250"),
    "Turkish": (
        "Dün aldığım ürün bozuk çıktı, geri iade etmek istiyorum. Kargo şirketi çok geç getirdi; harika bir uygulama, "
        "herkese tavsiye ederim, çok beğendim.",
        "cp1254",
    ),
    "Russian": ("Здравствуйте, хочу вернуть товар, потому что он не работает.", "cp1251"),
    "Russian, Unix": ("Здравствуйте, хочу вернуть товар, потому что он не работает.", "koi8-r"),
    "Greek": ("Καλημέρα σας, θα ήθελα να επιστρέψω το προϊόν γιατί δεν λειτουργεί.", "cp1253"),
    "Korean": ("안녕하세요, 주문한 상품이 아직 도착하지 않았습니다. 환불해 주세요.", "cp949"),
    "Japanese": ("こんにちは、商品が届きませんでした。返金をお願いします。", "shift_jis"),
    "Chinese": ("您好,我收到的商品有问题,请尽快给我退款,谢谢。", "gb18030"),
    "UTF-8": ("Zażółć gęślą jaźń: 您好", "utf-8"),
    "a byte order mark": ("naïve", "utf-8-sig"),
    "UTF-16": ("naïve, 您好", "utf-16"),
    "UTF-32": ("naïve, 您好", "utf-32"),
}


def detect(content: bytes) -> str:
    return detect_encoding(io.BytesIO(content))


@pytest.mark.parametrize(("text", "encoding"), LANGUAGES.values(), ids=LANGUAGES)
def test_the_encoding_found_reads_what_was_written(text: str, encoding: str) -> None:
    for repeats in (20, 3000):  # the second is more than the sample that is looked at
        table = "label,text\n" + f"a,{text}\nb,plain words\n" * repeats
        content = table.encode(encoding)
        assert content.decode(detect(content)) == table


def test_english_with_a_few_signs_is_western_whatever_a_detector_says() -> None:
    said = (
        "How do I top ™ up?,a\nWhy is there £20 of a charge on my withdrawal,a\ndon’t The card is non-functional.,a\n"
    )
    assert detect(said.encode("cp1252")) == "cp1252"


def test_one_letter_at_the_very_end_decides() -> None:
    plain = b"label,text\n" + b"a,words\n" * 300_000
    assert detect(plain) == UTF8
    assert detect(plain + b"b,caf\xe9\n") == "cp1252"


@pytest.mark.parametrize(
    ("valid", "broken", "plain", "found"),
    [
        pytest.param(5, 3, 1000, UTF8, id="under 1%"),
        pytest.param(3, 5, 1000, UTF8, id="under 1% though more than the valid"),
        pytest.param(40, 20, 0, UTF8, id="a third, but fewer than the valid"),
        pytest.param(2, 40, 100, "cp1252", id="a few lines that happen to be UTF-8 too"),
        pytest.param(0, 1, 1000, "cp1252", id="nothing speaks for UTF-8"),
    ],
)
def test_a_few_broken_lines_leave_it_utf8(valid: int, broken: int, plain: int, found: str) -> None:
    lines = b"a,caf\xc3\xa9 again\n" * valid + b"a,caf\xe9 again and again\n" * broken + b"a,b\n" * plain
    assert detect(lines) == found


def test_blocks_end_with_lines_and_long_lines_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 8)
    monkeypatch.setattr(module, "_LONGEST_LINE", 40)
    table = "a,café now and again\n" * 30
    assert all(block.endswith(b"\n") for block in module._blocks(io.BytesIO(table.encode())))
    assert detect(table.encode()) == UTF8, "a letter of two bytes on the edge of a block is no broken one"
    assert detect(table.encode("cp1252")) == "cp1252"
    assert detect(table.replace("\n", "\r").encode()) == UTF8
    assert b"".join(module._blocks(io.BytesIO(b"x" * 100 + b"\ny"))) == b"x" * 100 + b"\ny"


@pytest.mark.parametrize(
    ("head", "separator"),
    [
        ("a,b\n1,2\n", ","),
        ("a;b\n1,5;2\n1,5;3\n", ";"),
        ("a\tb\none, two\tx\n", "\t"),
        ("a|b\n1|2\n", "|"),
        ('"a;b",c\n"1;1",2\n', ","),
        ("text,label\na;b;c,x\nd;e;f,y\n", ","),
        ("text\nwords, and words\n", ","),
        ("name, first;age\nAda;1\nBob;2\n", ";"),
        ("a, b, c;d\n1;2\n3;4\n", ";"),
        ('a;b\n"one\ntwo";x\n"three";y\n', ";"),
        ("v1,v2,,,\nham,text,,,\n", ","),
        ("", ","),
    ],
)
def test_the_separator_is_the_one_that_cuts_the_rows_like_the_header(head: str, separator: str) -> None:
    assert detect_separator(head, "\n") == separator


def test_where_none_stands_in_the_header_the_usual_one_stays() -> None:
    assert detect_separator("text\nwords\n", "\n", "\t") == "\t"
    assert detect_separator("a,b\n1,2\n", "\n", "\t") == ","


def test_line_ends() -> None:
    assert [detect_newline(head) for head in ("a\nb", "a\r\nb", "a\rb", "a", "a\rb\nc")] == [
        "\n",
        "\n",
        "\r",
        "\n",
        "\n",
    ]


def test_a_dialect_that_cannot_be_is_told_what_to_type() -> None:
    with pytest.raises(UsageError, match="--separator ';;' is not one character; write"):
        Dialect(separator=";;")
    with pytest.raises(UsageError, match="--encoding 'latin-99' is unknown; write utf-8, cp1252"):
        Dialect(encoding="latin-99")
    with pytest.raises(UsageError, match="--encoding 'hex' is unknown"):
        Dialect(encoding="hex")  # a codec that Python knows, but not of text
    assert Dialect(encoding="UTF8").codec == UTF8
    assert encoding_name(UTF8) == "UTF-8"
    assert encoding_name("cp1252") == "Windows-1252"
