"""Text -> token ids, through Hugging Face `tokenizers`, and the ids of a whole table as two flat files.

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
from array import array
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
from bertforge.data.streaming import ahead
from bertforge.errors import ArtifactError
from bertforge.manifest import read_manifest, remake, write_manifest

MAX_TOKENS = 512  # [CLS] and [SEP] included; BERT has this many positions
_WINDOW = 1024  # characters of a text that are tokenized at once, and the rest of the word that they end in
_PLAIN = re.compile("[A-Za-z0-9]*")  # letters that no normalizer removes and no pre-tokenizer splits
_BATCH = 1024  # texts given to `tokenizers` at once: its result takes some 30 KB a text until the ids are taken out
_BATCH_CHARACTERS = 1 << 19  # of which each may become a token of 400 bytes
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
        self._breaks = Breaks.of(backend) if backend.encode("").ids == [self.cls_id, self.sep_id] else None
        self._longest_word = _longest_word(backend)
        self._serialised: str = backend.to_str()
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
        """Flat ids and offsets [texts + 1]; uses all cores (RAYON_NUM_THREADS sets how many)."""
        ids = array("H" if self.dtype.itemsize == 2 else "I")
        lengths = np.zeros(len(texts) + 1, dtype=np.int64)
        row = 0
        for batch in self._encodings(texts):
            for windows in batch:
                row += 1
                found = windows[0].ids
                if len(windows) > 1:
                    inner = [token for window in windows for token in window.ids[1:-1]]
                    found = [self.cls_id, *inner[: MAX_TOKENS - 2], self.sep_id]
                lengths[row] = len(found)
                ids.extend(found)
        return np.frombuffer(ids, dtype=self.dtype), np.cumsum(lengths)

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

    def _encodings(self, texts: Sequence[str]) -> Iterator[list[list[tokenizers.Encoding]]]:
        batches = map(self._encode_batch, _batches(texts))
        # The next batch is tokenized, without the interpreter lock, while this one's ids are taken out.
        return ahead(batches) if len(texts) > _BATCH else batches

    def _encode_batch(self, texts: Sequence[str]) -> list[list[tokenizers.Encoding]]:
        """The encodings of the windows of each text, as many as it takes to fill MAX_TOKENS.

        A window ends where BERT splits a text whatever stands there, so the tokens of the windows are those of the
        text. What truncation throws away of a long text is not read, and no token of it costs memory.
        """
        encode = self._backend.encode_batch_fast
        found: list[list[tokenizers.Encoding]] = [[] for _ in texts]
        left = [(row, 0, MAX_TOKENS - 2) for row in range(len(texts))]  # row, where its next window starts, tokens
        while left:
            ends = [self._window_end(texts[row], start) for row, start, _ in left]
            windows = [self._window(texts[row], start, end) for (row, start, _), end in zip(left, ends, strict=True)]
            more = []
            for (row, _, wanted), end, encoding in zip(left, ends, encode(windows), strict=True):
                found[row].append(encoding)
                wanted -= len(encoding) - 2
                if wanted > 0 and end < len(texts[row]) and self._breaks:
                    more.append((row, end, wanted))
            left = more
        return found

    def _window_end(self, text: str, start: int) -> int:
        if self._breaks is None:
            return min(len(text), _UNBROKEN)
        if len(text) <= start + _WINDOW:
            return len(text)
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
