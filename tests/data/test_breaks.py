"""A long text cut into windows has the tokens of the whole."""

from __future__ import annotations

import random
import re
import sys
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Whitespace

from bertforge.data import tokens
from bertforge.data.breaks import Breaks
from bertforge.data.tokens import MAX_TOKENS, Tokenizer

PIECES = [
    *(
        "how",
        "sort",
        "ß",
        "é",
        "e\u0301",
        "\u0301",
        "İ",
        "ﬁ",
        "Σ",
        "한",
        "ไ",
        "😀",
        "👍🏽",
        "1",
        "##s",
        "s" * 150,
        "t" * 101,
    ),
    *(" ", "  ", "\t", "\n", "\u00a0", "\u2028", "\x00", "\x1c", "\x85", "\u200b", "\ufeff", "\ufffd"),
    *(".", "…", "“", "-", "_", "≠", "中", "﨎", "[", "]", "[SEP]", "[MASK", "SEP]", "[UNK]"),
]


@pytest.fixture
def backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, that reads texts whole."""
    backend = tokenizers.Tokenizer.from_str(tokenizer._serialised)
    backend.enable_truncation(MAX_TOKENS)
    return backend


def texts() -> list[str]:
    draws = random.Random(0)
    counts = [2000 if number % 10 == 0 else draws.randint(1, 60) for number in range(200)]
    return ["".join(draws.choices(draws.sample(PIECES, draws.randint(1, 6)), k=count)) for count in counts]


def split(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[start:end].tolist() for start, end in pairwise(offsets)]


@pytest.mark.parametrize("window", [1, 40])
def test_windows_have_the_tokens_of_the_whole_text(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    whole = [encoding.ids for encoding in backend.encode_batch(texts())]
    monkeypatch.setattr(tokens, "_WINDOW", window)

    def found() -> list[list[int]]:
        return split(*tokenizer.encode(texts()))

    assert found() == whole
    assert any(len(ids) == MAX_TOKENS for ids in whole)
    anywhere = re.compile(".", re.DOTALL)
    tokenizer._breaks = Breaks(anywhere, anywhere, anywhere)
    assert found() != whole, "these texts may be cut anywhere: the test shows nothing"


def test_added_tokens_are_never_cut(backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.add_tokens(["covid-19", "sort", AddedToken("a.b c", normalized=False), "中文"])
    draws = random.Random(0)
    parts = ["covid-19", "Covid", "-", "19", "sort", "so", "rt", "a.b c", "a.b", ".", " ", "c", "中", "文", "s" * 200]
    some = ["".join(draws.choices(parts, k=30)) for _ in range(200)]
    whole = [encoding.ids for encoding in backend.encode_batch(some)]
    monkeypatch.setattr(tokens, "_WINDOW", 2)
    assert split(*Tokenizer(backend).encode(some)) == whole


def test_every_character_that_bert_splits_at_is_a_break(backend: tokenizers.Tokenizer) -> None:
    """Else a text of nothing but such would be one window, and a token each character would fill the memory."""
    found = Breaks.of(backend)
    assert found is not None
    for code in [*range(0x20, 0x3400), *range(0x3400, 0x20000, 37), *range(0x20000, sys.maxunicode, 997)]:
        letter = chr(code)
        if not 0xD800 <= code < 0xE000 and letter not in "[]":
            words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{letter}b"))
            splits = [word for word, _ in words][:: max(1, len(words) - 1)] == ["a", "b"]
            assert (found.next(f"a{letter}b", 1) < 3) == splits, hex(code)


@pytest.mark.parametrize("unit", [".", "a", " ", "中", "≠", "]", "\u0301", "a."], ids=ascii)
def test_of_a_text_no_more_is_tokenized_than_can_matter(tokenizer: Tokenizer, unit: str) -> None:
    given: list[int] = []
    words = tokenizer._words
    assert words is not None

    def counting(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        given.extend(map(len, texts))
        return words(texts)

    tokenizer._words = counting  # type: ignore[assignment]
    tokenizer.encode([unit * 100_000])
    most = {" ": 100_000, "\u0301": 100_000, "a": 2200}.get(unit, 2100)  # blank or removed: all of it must be looked at
    assert 2000 < sum(given) <= most


def test_a_tokenizer_of_another_kind_reads_the_start_of_a_text(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer
) -> None:
    backend.pre_tokenizer = Whitespace()
    assert Breaks.of(backend) is None
    ids, _ = Tokenizer(backend).encode(["how " + " " * 70_000 + "sort"])
    assert ids.tolist() == backend.encode("how").ids
