"""Where a text may be cut without any effect on its tokens, so that a long one need not be tokenized whole.

BERT's normalizer looks at one character at a time, and its pre-tokenizer splits before and after white space,
punctuation and ideographs, whatever stands there. Between two such places is one word, which is a hundred tokens at
most. Added tokens ([SEP]) are looked for before that: a place inside one is no place to cut.
"""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cache

import tokenizers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

# https://github.com/huggingface/tokenizers/blob/v0.22.0/tokenizers/src/normalizers/bert.rs, is_chinese_char
_IDEOGRAPHS = "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
_IDEOGRAPHS += "\uf900-\ufaff\U0002f800-\U0002fa1f"
_SIGNS = "\u166d\u1fef\u2260\u226e\u226f\U000111c9"  # what `tokenizers` splits at besides, by its age or as two signs


def breaks(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Matches, without taking a character, where a text may be cut; None for a tokenizer of which this is not known."""
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    added = list(backend.get_added_tokens_decoder().values())
    if not (isinstance(normalizer, BertNormalizer) and isinstance(splitter, BertPreTokenizer)):
        return None
    if any(token.single_word for token in added):  # looks at the characters beside it
        return None
    # What this version of `tokenizers` splits at: its tables of Unicode are not Python's.
    marks = [mark for mark in _marks() if _splits(normalizer, splitter, mark)]
    inner = {mark for token in added for mark in token.content[1:]}
    outer = {mark for token in added for mark in token.content[:-1]}
    before = "".join(re.escape(mark) for mark in marks if mark not in inner)
    after = "".join(re.escape(mark) for mark in marks if mark not in outer)
    ideographs = _IDEOGRAPHS if _splits(normalizer, splitter, _IDEOGRAPHS[0]) else ""
    if re.search(f"[{_IDEOGRAPHS}]", "".join(token.content for token in added)):
        ideographs = ""
    return re.compile(f"(?=[{before}{ideographs}])|(?<=[{after}{ideographs}])")


@cache
def _marks() -> str:
    """White space and punctuation, of which BERT counts all signs of ASCII."""
    others = (chr(code) for code in range(128, 0x20000) if unicodedata.category(chr(code))[0] in "PZ")
    return " \t\n\r" + string.punctuation + "".join(others) + _SIGNS


def _splits(normalizer: BertNormalizer, splitter: BertPreTokenizer, mark: str) -> bool:
    words = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(f"a{mark}b"))]
    return words[0] == "a" and words[-1] == "b"
