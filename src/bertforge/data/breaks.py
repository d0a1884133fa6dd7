"""Where a text may be cut without any effect on its tokens, so that a long one need not be tokenized whole.

BERT's normalizer looks at one character at a time, and its pre-tokenizer splits before and after white space,
punctuation and ideographs, whatever stands there. Between two such places is one word, which is a hundred tokens at
most. Added tokens ([SEP]) are looked for before that: a place inside one is no place to cut.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from functools import cache

import tokenizers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

# https://github.com/huggingface/tokenizers/blob/v0.22.0/tokenizers/src/normalizers/bert.rs, is_chinese_char
_IDEOGRAPHS = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff"
_RARE_IDEOGRAPHS = "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f"
_RARE = "\U00010000-\U0010ffff"
_SIGNS = "\u166d\u1fef\u2260\u226e\u226f\U000111c9"  # what `tokenizers` splits at besides, by its age or as two signs


@dataclass(frozen=True)
class Breaks:
    """Where a text may be cut: at certain characters, before or behind them."""

    candidates: re.Pattern[str]
    """All that are one, and some that are none: with ranges above U+FFFF Python's `re` is slow."""
    before: re.Pattern[str]
    behind: re.Pattern[str]

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> Breaks | None:
        """Those of a tokenizer; None for one of which they are not known."""
        normalizer, splitter = backend.normalizer, backend.pre_tokenizer
        added = list(backend.get_added_tokens_decoder().values())
        if not (isinstance(normalizer, BertNormalizer) and isinstance(splitter, BertPreTokenizer)):
            return None
        if any(token.single_word for token in added):  # looks at the characters beside it
            return None
        # Looked for in the normalized text, where every white space is a blank.
        if any(token.normalized and any(map(str.isspace, token.content)) for token in added):
            return None
        # What this version of `tokenizers` splits at: its tables of Unicode are not Python's.
        marks = [mark for mark in _marks() if _splits(normalizer, splitter, mark)]
        inner = {mark for token in added for mark in token.content[1:]}
        outer = {mark for token in added for mark in token.content[:-1]}
        every = _any_of(_IDEOGRAPHS, _RARE_IDEOGRAPHS)
        split = _splits(normalizer, splitter, "\u4e00") and not any(every.search(token.content) for token in added)
        ideographs = (_IDEOGRAPHS, _RARE_IDEOGRAPHS) if split else ("", "")
        return cls(
            _any_of(ideographs[0], _RARE, *(mark for mark in marks if mark <= "\uffff")),
            _any_of(*ideographs, *(mark for mark in marks if mark not in inner)),
            _any_of(*ideographs, *(mark for mark in marks if mark not in outer)),
        )

    def next(self, text: str, start: int) -> int:
        """The first place from `start` on, or the end of the text."""
        for found in self.candidates.finditer(text, start):
            if self.before.match(found[0]):
                return found.start()
            if self.behind.match(found[0]):
                return found.end()
        return len(text)


def _any_of(*parts: str) -> re.Pattern[str]:
    """One of these characters, or of these ranges."""
    return re.compile(f"[{''.join(part if part[1:2] == '-' else re.escape(part) for part in parts)}]")


@cache
def _marks() -> str:
    """White space and punctuation, of which BERT counts all signs of ASCII."""
    others = (chr(code) for code in range(128, 0x20000) if unicodedata.category(chr(code))[0] in "PZ")
    return " \t\n\r" + string.punctuation + "".join(others) + _SIGNS


def _splits(normalizer: BertNormalizer, splitter: BertPreTokenizer, mark: str) -> bool:
    words = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(f"a{mark}b"))]
    return words[0] == "a" and words[-1] == "b"
