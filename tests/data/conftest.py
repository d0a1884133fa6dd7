from __future__ import annotations

from pathlib import Path

import pytest

from bertforge.data.tokens import Tokenizer

WORDS = "how do i sort list it says no print why the a of to"
PIECES = [*"?.,\"()'0123456789", "##s", "##t", *(f"##{digit}" for digit in range(10))]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A folder with a tiny BERT vocabulary and nothing else."""
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *PIECES]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture
def tokenizer(vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary)
