"""Text -> token ids, those of Hugging Face `tokenizers`, and the ids of a whole table as two flat files.

A row's text is its text columns joined by one space. Its ids are [CLS] + WordPiece ids + [SEP], cut so that they are at
most MAX_TOKENS: what is cut is the end of the text, and [CLS] and [SEP] stay.

On disk: `ids.npy`, all rows' ids one after another (uint16 while the vocabulary fits, else uint32), and `offsets.npy`,
int64 [rows + 1], so row i is ids[offsets[i]:offsets[i + 1]]. Both are memory-mapped when read: nothing is padded,
nothing is pickled, and a table of any size opens at once. A manifest beside them says of which data they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from bertforge.artifact import write_atomic, write_json
from bertforge.data.breaks import Breaks
from bertforge.data.streaming import in_order
from bertforge.data.words import Words, gather
from bertforge.errors import ArtifactError
from bertforge.manifest import read_manifest, remake, write_manifest
from bertforge.threads import count

MAX_TOKENS = 512  # [CLS] and [SEP] included; BERT has this many positions
_WINDOW = 2048  # characters of a text that are tokenized at once, and the rest of the word that they end in
_PLAIN = re.compile("[A-Za-z0-9]*")  # letters that no normalizer removes and no pre-tokenizer splits
_BATCH = 2048  # texts laid out at once
_BATCH_CHARACTERS = 1 << 20  # of which each may become a piece, which takes some 60 bytes until the ids are laid out
_THREADS = 4  # that encode; more wait for the interpreter, which a tenth of the work needs
_UNBROKEN = 1 << 16  # characters read of a text where no windows can be cut

Ids = NDArray[np.unsignedinteger[Any]]


class Tokenizer:
    """A BERT tokenizer that truncates to MAX_TOKENS and never pads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """`backend` is taken over: its truncation and padding are set here."""
        backend.enable_truncation(MAX_TOKENS)
        backend.no_padding()
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.cls_id, self.sep_id, self.pad_id = (self._special(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
        self.unk_id: int = -1 if (unknown := backend.token_to_id("[UNK]")) is None else unknown
        self._breaks = Breaks.of(backend) if backend.encode("").ids == [self.cls_id, self.sep_id] else None
        self._longest_word = _longest_word(backend)
        self._serialised: str = backend.to_str()
        self._words: Words | None = None
        if self._breaks is not None:  # which cuts texts by itself
            backend.no_truncation()
            self._words = Words(backend, self._breaks, self.dtype, self.sep_id)
        self.fingerprint = "sha256:" + hashlib.sha256(self._serialised.encode()).hexdigest()

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads `tokenizer.json`, or else `vocab.txt` with `tokenizer_config.json` beside it.

        Raises ArtifactError when there is neither, or the file is damaged.
        """
        whole, vocabulary = directory / "tokenizer.json", directory / "vocab.txt"
        if whole.is_file():
            try:
                return cls(tokenizers.Tokenizer.from_file(str(whole)))
            except ArtifactError:
                raise
            except Exception as error:  # tokenizers raises bare Exception
                raise ArtifactError(f"{whole} is not a readable tokenizer ({error})") from error
        if vocabulary.is_file():
            return cls(_from_vocabulary(vocabulary))
        raise ArtifactError(
            f"{directory} holds neither tokenizer.json nor vocab.txt; name a folder with a BERT tokenizer"
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """Flat ids and offsets [texts + 1]; of many texts in several threads, which `tokenizers` adds to by itself."""
        ids, lengths = [np.zeros(0, self.dtype)], [np.zeros(1, np.int64)]
        batches = list(_batches(texts))
        encoded = in_order(self._encode_batch, batches, min(_THREADS, count())) if len(batches) > 1 else None
        for found, each in encoded or map(self._encode_batch, batches):
            ids.append(found)
            lengths.append(each)
        return np.concatenate(ids), np.cumsum(np.concatenate(lengths))

    def count(self, text: str) -> int:
        """Tokens of a whole text, [CLS] and [SEP] included, and what `encode` cuts off too."""
        found = self._backend.encode(text)
        return len(found.ids) + sum(len(rest.ids) - 2 for rest in found.overflowing)

    def save(self, directory: Path, max_length: int = MAX_TOKENS) -> Path:
        """Writes `tokenizer.json`; loading it gives a tokenizer of the same fingerprint.

        `tokenizer_config.json` beside it tells transformers the same, and the `max_length` to cut a text to.
        """
        write_json(directory / "tokenizer_config.json", self._config() | {"model_max_length": max_length})
        return write_atomic(directory / "tokenizer.json", self._serialised)

    def _config(self) -> dict[str, Any]:
        """What transformers 4 and 5 read of `tokenizer_config.json`.

        Version 5 takes the vocabulary alone from a BertTokenizer's `tokenizer.json` and the rest from here, so only
        BERT's own normalizer may go by that name; PreTrainedTokenizerFast takes the file as it is.
        """
        special = [(name, f"[{name.upper()}]") for name in ("unk", "sep", "pad", "cls", "mask")]
        config: dict[str, Any] = {
            f"{name}_token": token for name, token in special if self._backend.token_to_id(token) is not None
        }
        normalizer = self._backend.normalizer
        if not isinstance(normalizer, BertNormalizer) or not isinstance(self._backend.pre_tokenizer, BertPreTokenizer):
            return {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        return {
            "tokenizer_class": "BertTokenizer",
            **config,
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        }

    def _encode_batch(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """Flat ids, and how many each text has; read in as many windows as it takes to fill MAX_TOKENS.

        A window ends where BERT splits a text whatever stands there, so the tokens of the windows are those of the
        text. What truncation throws away of a long text is not read, and no token of it costs memory.
        """
        if self._words is None:
            whole = [encoding.ids for encoding in self._backend.encode_batch_fast([t[:_UNBROKEN] for t in texts])]
            return np.array([i for ids in whole for i in ids], self.dtype), np.array([len(ids) for ids in whole])
        every = np.arange(len(texts))
        pool = [np.array([self.cls_id, self.sep_id], self.dtype)]
        parts = [(every, np.zeros_like(every), np.ones_like(every))]  # the text, where in the pool, how many: [CLS]
        rows, at, wanted = every, [0] * len(texts), np.full(len(texts), MAX_TOKENS - 2)
        counts = np.full(len(texts), 2)
        while len(rows):
            those = [texts[row] for row in rows.tolist()]
            ends = list(map(self._window_end, those, at))
            found, lengths = self._words(list(map(self._window, those, at, ends)))
            taken = np.minimum(lengths, wanted)  # [windows]
            parts.append((rows, sum(map(len, pool)) + np.cumsum(lengths) - lengths, taken))
            pool.append(found)
            counts[rows] += taken
            more = (taken < wanted) & (np.array(ends) < [len(text) for text in those])
            rows, at, wanted = rows[more], [ends[place] for place in np.flatnonzero(more)], (wanted - taken)[more]
        parts.append((every, np.ones_like(every), np.ones_like(every)))  # [SEP]
        row, start, length = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(row, kind="stable")
        return gather(np.concatenate(pool), start[order], length[order]), counts

    def _window_end(self, text: str, start: int) -> int:
        if len(text) <= start + _WINDOW:
            return len(text)
        assert self._breaks is not None, "there are no windows without them"
        return self._breaks.next(text, start + _WINDOW)

    def _window(self, text: str, start: int, end: int) -> str:
        """`text[start:end]`, or less of it where its last word is so long that it is [UNK] whatever follows."""
        last_word, sure = start + _WINDOW, start + _WINDOW + self._longest_word + 1
        if end > sure and _PLAIN.fullmatch(text, last_word, end):
            return text[start:sure]
        return text[start:end]

    def _special(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise ArtifactError(f"the tokenizer has no {token} token, so it is not BERT's; name a BERT model")
        return int(found)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """`texts` in order, at most _BATCH of them and _BATCH_CHARACTERS in their windows."""
    start = characters = 0
    for row, text in enumerate(texts):
        if row - start == _BATCH or characters > _BATCH_CHARACTERS:
            yield texts[start:row]
            start, characters = row, 0
        characters += min(len(text), _WINDOW)
    if start < len(texts):
        yield texts[start:]


def _longest_word(backend: tokenizers.Tokenizer) -> int:
    """Letters of the longest word that is not [UNK]; more than any text has where that is not known."""
    added = (token.content for token in backend.get_added_tokens_decoder().values())
    if not isinstance(backend.model, WordPiece) or any(map(_PLAIN.fullmatch, added)):
        return sys.maxsize
    return int(backend.model.max_input_chars_per_word)


def _from_vocabulary(path: Path) -> tokenizers.Tokenizer:
    """BERT's own tokenizer around a vocabulary; a missing setting has the value it has in transformers."""
    beside = path.with_name("tokenizer_config.json")
    settings: dict[str, Any] = json.loads(beside.read_text()) if beside.is_file() else {}
    vocabulary = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").splitlines())}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if token not in vocabulary]
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}, so it is not a BERT vocabulary")
    backend = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocabulary])
    backend.normalizer = BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
    )
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return backend


@dataclass(frozen=True)
class TokenStore:
    """The ids of every row of a table, memory-mapped."""

    ids: Ids
    """[tokens], all rows one after another."""
    offsets: NDArray[np.int64]
    """[rows + 1]."""

    @classmethod
    def open(cls, directory: Path, tokenizer: Tokenizer, fingerprint: str) -> TokenStore:
        """Reads what a TokenWriter wrote; raises ArtifactError when it is damaged, or of other data or tokenizers."""
        manifest = read_manifest(directory, "tokens")
        if (manifest["tokenizer"], manifest["fingerprint"]) != (tokenizer.fingerprint, fingerprint):
            raise ArtifactError(
                f"{directory} holds the tokens of another table or tokenizer; {remake(directory, 'tokens', manifest)}"
            )
        return cls(np.load(directory / "ids.npy", mmap_mode="r"), np.load(directory / "offsets.npy", mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Ids:
        """[length] the ids of one row."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] tokens in each row."""
        return np.diff(self.offsets)


class TokenWriter:
    """Appends ids to `ids.npy`, and on leaving writes `offsets.npy`, the tokenizer and a manifest beside it."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, fingerprint: str) -> None:
        """`fingerprint` is that of the prepared data whose texts are appended."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._tokenizer, self._fingerprint = directory, tokenizer, fingerprint
        self._file: IO[bytes] = (directory / "ids.npy").open("wb")
        self._lengths: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        self._count = 0  # tokens
        self.rows = 0
        self._write_header()

    def append(self, texts: Sequence[str]) -> None:
        ids, offsets = self._tokenizer.encode(texts)
        self._file.write(ids.data)
        self._count += len(ids)
        self._lengths.append(np.diff(offsets))
        self.rows += len(texts)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.seek(0)
            self._write_header()
            np.save(self._directory / "offsets.npy", np.cumsum(np.concatenate(self._lengths)))
            self._tokenizer.save(self._directory)
        self._file.close()
        if kind is None:
            write_manifest(
                self._directory,
                "tokens",
                tokenizer=self._tokenizer.fingerprint,
                fingerprint=self._fingerprint,
                rows=self.rows,
            )

    def _write_header(self) -> None:
        """A .npy header of 128 bytes whatever the count, so that the final one fits where the first one stood.

        https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html#format-version-1-0
        """
        header = repr({"descr": self._tokenizer.dtype.str, "fortran_order": False, "shape": (self._count,)})
        self._file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{header:<117}\n".encode())
