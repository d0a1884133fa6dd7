"""The tokens of texts by way of their words, each of which `tokenizers` is asked for once.

`tokenizers` takes 240 us of a core for a question of 184 tokens, some 1.3 us a token, and text repeats itself: of the
14 million pieces in 44,878 questions 170,000 differ. So a text is cut into pieces at the places where BERT splits
whatever stands there (see `breaks.py`), each different piece is tokenized once, and the ids of a text are those of its
pieces. What a piece is made of is for `tokenizers` alone to say, so the ids are its own: there is no second tokenizer
whose tables of Unicode could differ.

Only signs of ASCII cut, because in UTF-8 one byte tells them: white space and punctuation. Other letters, ideographs
too, stay within a piece. Cutting, telling the pieces apart and laying out the ids are calls of NumPy and Arrow over a
thousand texts, without the interpreter lock, so threads share the work: 25 us of a core for such a question, and 50 at
first, until the frequent words are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
from numpy.typing import NDArray

from bertforge.data.breaks import Breaks

_KNOWN = 1 << 18  # pieces remembered: 30 MB; then memory begins anew
_TOGETHER = 128  # pieces asked for as one text
_BETWEEN = "\n[SEP]\n"
_LONGEST = 64  # bytes of a piece that is remembered; longer ones seldom come again


class Words:
    """A tokenizer that remembers words; any number of threads may call it."""

    def __init__(self, backend: tokenizers.Tokenizer, breaks: Breaks, dtype: np.dtype[Any], sep_id: int) -> None:
        """`backend` must not truncate."""
        self._backend, self._dtype, self._sep_id = backend, dtype, sep_id
        marks = [chr(byte) if byte < 128 else "" for byte in range(256)]
        self._before = np.array([bool(breaks.before.match(mark)) for mark in marks])  # [256]
        self._behind = np.array([bool(breaks.behind.match(mark)) for mark in marks])  # [256]
        alone = [encoding.ids for encoding in backend.encode_batch_fast([_BETWEEN], add_special_tokens=False)]
        line_end = breaks.before.match("\n") and breaks.behind.match("\n")  # none within an added token
        self._together = _TOGETHER if line_end and alone == [[sep_id]] else 1
        self._known: dict[bytes, bytes] = {}

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The ids of all texts one after another, without [CLS] and [SEP], and how many each has, `[texts]`."""
        held = pa.array(texts, pa.large_string())
        _, offsets, letters = held.buffers()
        bounds = np.frombuffer(offsets, np.int64, len(texts) + 1)
        if bounds[-1] == 0:
            return np.zeros(0, self._dtype), np.zeros(len(texts), np.int64)
        signs = np.frombuffer(letters, np.uint8, bounds[-1])
        begins = self._before.take(signs)  # [bytes]
        begins[1:] |= self._behind.take(signs[:-1])
        begins[bounds[:-1][bounds[:-1] < len(signs)]] = True
        starts = np.flatnonzero(begins)  # [pieces]
        ends = pa.py_buffer(np.append(starts, len(signs)))
        pieces = pa.Array.from_buffers(pa.large_binary(), len(starts), [None, ends, letters]).dictionary_encode()
        found = self._tokens(pieces.dictionary.to_pylist())
        pool = np.frombuffer(b"".join(found), self._dtype)
        lengths = np.fromiter(map(len, found), np.int64, len(found)) // self._dtype.itemsize  # [different pieces]
        which = pieces.indices.to_numpy()  # [pieces]
        taken = lengths.take(which)  # [pieces]
        until = np.concatenate([[0], np.cumsum(taken)])[np.searchsorted(starts, bounds)]  # [texts + 1]
        return gather(pool, (np.cumsum(lengths) - lengths).take(which), taken), np.diff(until)

    def _tokens(self, pieces: list[bytes]) -> list[bytes]:
        """The ids of each piece."""
        known = self._known
        found = [known.get(piece) for piece in pieces]
        new = [place for place, ids in enumerate(found) if ids is None]
        for place, ids in zip(new, self._asked([pieces[place].decode() for place in new]), strict=True):
            found[place] = ids
            if len(pieces[place]) <= _LONGEST:
                known[pieces[place]] = ids
        if len(known) > _KNOWN:
            self._known = {}
        return found  # type: ignore[return-value]  # none is None any more

    def _asked(self, pieces: list[str]) -> Iterator[bytes]:
        """The ids that `tokenizers` gives each piece: many as one text, with [SEP] between, take it half the time."""
        groups = [pieces[start : start + self._together] for start in range(0, len(pieces), self._together)]
        for group, ids in zip(groups, self._ids([_BETWEEN.join(group) for group in groups]), strict=True):
            ends = [*np.flatnonzero(ids == self._sep_id).tolist(), len(ids)]
            if len(ends) == len(group):
                starts = [0, *(end + 1 for end in ends)]
                yield from (ids[start:end].tobytes() for start, end in zip(starts, ends, strict=False))
            else:  # a piece is [SEP] itself
                yield from (ids.tobytes() for ids in self._ids(group))

    def _ids(self, texts: list[str]) -> list[NDArray[Any]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]


def gather(pool: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
    """Parts of `pool`, `lengths` long from `starts` on, one after another."""
    ends = np.cumsum(lengths)
    return pool.take(np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths))
