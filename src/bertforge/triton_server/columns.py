"""Rows of a table -> token ids and the arrays of the columns, where the engine reads columns beside the text.

As `text`, but by training's own code: the server's Python needs bertforge. A cell is a string, as a CSV file has it;
"" is a missing one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.engines.base import BatchShape, feeds
from bertforge.engines.run import batch_of
from bertforge.errors import DataError
from bertforge.inference.codec import Codec
from bertforge.triton_server.text import check_texts, respond


class TableReader:
    """The columns of the training table, the label aside -> the engine's tensors, `[rows, ...]`."""

    def __init__(self, folder: Path, tensors: Collection[str]) -> None:
        """`folder` holds `settings.json`, and the tokenizer and `codec.json` of the engine, which reads `tensors`."""
        self.settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
        self.codec = Codec.load(folder, json.loads((folder / "codec.json").read_text()))
        self.shape = BatchShape(tokens=0, edges=tuple(self.settings["lengths"]))
        self.tensors = tensors

    def __call__(self, given: dict[str, list[str]]) -> dict[str, np.ndarray]:
        """Raises ValueError for a row that `TextReader` would refuse, and for a number or date that cannot be read."""
        try:
            inputs = self.codec.read(pd.DataFrame(given))
            check_texts(inputs.texts, self.settings["rows"])
            for row, problem in enumerate(inputs.problems):
                if problem.startswith("unparsable"):
                    raise ValueError(f'row {row}: {problem}; mend it, or send "" for a missing value')
            arrays = self.codec.arrays(inputs.columns)
        except DataError as error:
            raise ValueError(str(error)) from error
        store = TokenStore(*self.codec.tokenizer.encode(inputs.texts))
        rows = np.arange(len(store))
        examples = Examples(store, np.full(len(rows), -1), self.codec.tokenizer.sep_id, self.codec.max_length, arrays)
        return feeds(batch_of(examples, rows, packed=False, shape=self.shape), self.tensors)


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Standard."""
        config = json.loads(args["model_config"])
        self.names, tensors = ([value["name"] for value in config[side]] for side in ("input", "output"))
        self.read = TableReader(Path(args["model_repository"], args["model_version"]), tensors)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Standard."""
        return respond(requests, self.read, self.names)
