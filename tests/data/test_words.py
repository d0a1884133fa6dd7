"""The ids are those of `tokenizers`, whatever the text and whatever was read before."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import tokenizers

from bertforge.data import words as module
from bertforge.data.breaks import Breaks
from bertforge.data.tokens import MAX_TOKENS, Tokenizer
from bertforge.models import resolve

PARTS = (
    *("[SEP]", "[CLS]", "[sep]", "[S", "EP]", "##", "##ing", "\u0301", "\u200b", "\ufeff", "\x00", "\x7f", "\x85"),
    *("\u00a0", "\u3000", "\u2028", "\r\n", "ß", "İ", "ﬁ", "漢字", "한국", "ไทย", "a\u0300\u0301", "👩‍👩‍👧", "\ufffd"),
    *("—", "…", "¿", "≠", "\u1fef", "x" * 101, "é" * 90, "!" * 50, " " * 300, "naïve", "don't", "C++", "sort", "List"),
)  # fmt: skip


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(resolve("minilm") / "tokenizer.json"))


def fuzzed(count: int, seed: int) -> list[str]:
    draws = random.Random(seed)

    def part() -> str:
        kind = draws.randrange(4)
        code = draws.choice((draws.randrange(128, 0xD800), draws.randrange(0xE000, 0x110000)))
        return chr(draws.randrange(128)) if kind < 2 else draws.choice(PARTS) if kind == 2 else chr(code)

    return ["".join(part() for _ in range(draws.randrange(40))) for _ in range(count)]


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    ids, offsets = tokenizer.encode(texts)
    return [ids[start:end].tolist() for start, end in pairwise(offsets)]


def expected(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    whole = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
    return [ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], ids[-1]] for ids in whole]


def test_fuzzed_texts_have_the_ids_of_tokenizers(backend: tokenizers.Tokenizer) -> None:
    tokenizer, texts = Tokenizer(backend), fuzzed(3000, 0)
    whole = expected(backend, texts)
    assert encoded(tokenizer, texts) == whole
    assert encoded(tokenizer, texts[::-1]) == whole[::-1], "from memory"
    anywhere = re.compile(".", re.DOTALL)
    tokenizer._words = module.Words(backend, Breaks(anywhere, anywhere, anywhere), tokenizer.dtype, 102)
    assert encoded(tokenizer, texts) != whole, "these texts may be cut anywhere: the test shows nothing"


def test_a_word_is_tokenized_once(backend: tokenizers.Tokenizer) -> None:
    asked: list[str] = []

    class Counting:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
            asked.extend(word for text in texts for word in text.split("\n[SEP]\n"))
            return backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    tokenizer = Tokenizer(backend)
    assert tokenizer._words is not None
    tokenizer._words._backend = Counting()  # type: ignore[assignment]
    first = encoded(tokenizer, ["Sort a list, sort it.", "sort"])
    assert sorted(asked) == sorted([" ", ",", ".", "Sort", "a", "it", "list", "sort"])
    assert encoded(tokenizer, ["Sort a list, sort it.", "sort", "a tuple"])[:2] == first
    assert asked[8:] == ["tuple"]


@pytest.mark.parametrize("added", ["\n", "sort\n", "\n[", "]\nList", "[SEP]\n"], ids=ascii)
def test_added_tokens_with_line_ends_are_not_made_up(added: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(resolve("minilm") / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(added, normalized=False)])
    draws = random.Random(0)  # a text with [SEP] would have each word asked for alone
    texts = ["".join(draws.choices(["sort", "List", " ", "\n", "[", added], k=9)) for _ in range(300)]
    assert encoded(Tokenizer(backend), texts) == expected(backend, texts)


@pytest.mark.parametrize("added", ["foo bar", "trail ", " lead", "Sort"], ids=ascii)
def test_added_tokens_that_are_looked_for_in_normalized_text(added: str) -> None:
    """There a tab and a line end are blanks, so they may stand within such a token."""
    backend = tokenizers.Tokenizer.from_file(str(resolve("minilm") / "tokenizer.json"))
    backend.add_tokens([added])
    texts = ["foo\nbar", "foo\tbar, foo bar", "trail, x", "a trail of", "x\nlead", "mislead, lead", "sort SORT resort"]
    assert encoded(Tokenizer(backend), texts) == expected(backend, texts)


def test_memory_is_bounded(backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN", 100)
    tokenizer = Tokenizer(backend)
    assert tokenizer._words is not None
    for seed in range(20):
        texts = fuzzed(50, seed)
        assert encoded(tokenizer, [*texts, "long" * 100]) == expected(backend, [*texts, "long" * 100])
        assert len(tokenizer._words._known) <= 100
    tokenizer._words._known.clear()
    tokenizer.encode(["short, or " + "long" * 17])
    assert sorted(tokenizer._words._known) == [b" ", b",", b"or", b"short"]


def test_threads_share_one_tokenizer(backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN", 500)  # forgotten while others read
    tokenizer, lots = Tokenizer(backend), [fuzzed(100, seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda texts: encoded(tokenizer, texts), lots * 2))
    assert found == [expected(backend, texts) for texts in lots] * 2


@pytest.mark.parametrize(
    "texts", [[""], ["", ""], ["", "a", ""], ["a", "", "b"], [" "], ["\x00"], ["é"], ["漢"]], ids=ascii
)
def test_texts_of_nothing_keep_their_place(backend: tokenizers.Tokenizer, texts: list[str]) -> None:
    assert encoded(Tokenizer(backend), texts) == expected(backend, texts)
