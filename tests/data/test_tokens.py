from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bertforge.data.tokens import MAX_TOKENS, Tokenizer, TokenStore, TokenWriter
from bertforge.errors import ArtifactError
from bertforge.models import resolve

TEXTS = ["How do I sort a list?", "", "é ünknown\tWORDS, 99", "the " * 2000, "a" * 200, "no\x00 \ufffd 漢字"]


def one_by_one(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The slow twin: tokenizers' own encode, cut by hand."""
    backend = tokenizer._backend
    backend.no_truncation()
    whole = [backend.encode(text).ids for text in texts]
    backend.enable_truncation(MAX_TOKENS)
    return [ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], tokenizer.sep_id] for ids in whole]


def split(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


def test_ids_are_those_of_tokenizers_one_by_one(tokenizer: Tokenizer) -> None:
    ids, offsets = tokenizer.encode(TEXTS)
    rows = split(ids, offsets)
    assert rows == one_by_one(tokenizer, TEXTS)
    assert [len(row) for row in rows][3] == MAX_TOKENS
    assert {(row[0], row[-1]) for row in rows} == {(tokenizer.cls_id, tokenizer.sep_id)}


def test_many_texts_take_the_overlapped_path_to_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = [f"sort list {i}" for i in range(2500)]
    assert split(*tokenizer.encode(texts)) == one_by_one(tokenizer, texts)


@pytest.mark.parametrize(
    "word", ["sort ", "sort  ", "sort   ", "unknownunknown ", "s", "a\u0301 ", "  ", "\n", "99999999 ", "how\t"]
)
def test_long_texts_lose_nothing_but_their_end(tokenizer: Tokenizer, word: str) -> None:
    texts = [word * (length // len(word)) + " list" for length in (2550, 2560, 2561, 2570, 5000, 20_000)]
    assert split(*tokenizer.encode(texts)) == one_by_one(tokenizer, texts)


def test_no_text_gives_no_ids(tokenizer: Tokenizer) -> None:
    ids, offsets = tokenizer.encode([])
    assert len(ids) == 0
    assert offsets.tolist() == [0]


def test_vocab_txt_alone_gives_the_ids_of_the_models_tokenizer_json(tmp_path: Path) -> None:
    model = resolve("minilm")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "vocab.txt").write_bytes((model / "vocab.txt").read_bytes())
    texts = [*TEXTS, "Ich weiß: naïve café's don't-stop  [SEP] C++ & <b>tags</b>\r\n\r\n    int x = 0;"]
    ids, offsets = Tokenizer.load(bare).encode(texts)
    expected_ids, expected_offsets = Tokenizer.load(model).encode(texts)
    assert ids.tolist() == expected_ids.tolist()
    assert offsets.tolist() == expected_offsets.tolist()


def test_tokenizer_config_decides_the_case(vocabulary: Path) -> None:
    lower = Tokenizer.load(vocabulary)
    (vocabulary / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    cased = Tokenizer.load(vocabulary)
    assert lower.encode(["SORT"])[0].tolist() == lower.encode(["sort"])[0].tolist()
    assert cased.encode(["SORT"])[0].tolist() != cased.encode(["sort"])[0].tolist()
    assert lower.fingerprint != cased.fingerprint


def test_saved_and_loaded_it_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXTS)[0].tolist() == tokenizer.encode(TEXTS)[0].tolist()


def test_a_folder_without_a_bert_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"neither tokenizer.json nor vocab.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ArtifactError, match=r"lacks \[UNK\]"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_stored_rows_come_back_memory_mapped(tokenizer: Tokenizer, vocabulary: Path, tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "t", tokenizer, "of data") as writer:
        writer.append(TEXTS[:2])
        writer.append([])
        writer.append(TEXTS[2:])
    store = TokenStore.open(tmp_path / "t", tokenizer, "of data")
    assert isinstance(store.ids, np.memmap)
    assert store.ids.dtype == np.uint16
    assert [store[row].tolist() for row in range(len(store))] == one_by_one(tokenizer, TEXTS)
    assert store.lengths.tolist() == [len(row) for row in one_by_one(tokenizer, TEXTS)]
    assert np.load(tmp_path / "t" / "ids.npy").tolist() == store.ids.tolist()
    (vocabulary / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    for other, data in ((tokenizer, "of other data"), (Tokenizer.load(vocabulary), "of data")):
        with pytest.raises(ArtifactError, match=r"of another table or tokenizer; .*tokenizes again: rm -r"):
            TokenStore.open(tmp_path / "t", other, data)


def test_a_large_vocabulary_is_stored_in_four_bytes(vocabulary: Path) -> None:
    with (vocabulary / "vocab.txt").open("a") as file:
        file.writelines(f"word{i}\n" for i in range(82_000))
    large = Tokenizer.load(vocabulary)
    ids, _ = large.encode(["word81999"])
    assert ids.dtype == np.uint32
    assert ids[1] == large.vocab_size - 1 > 1 << 16
