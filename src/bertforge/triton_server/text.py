"""Texts -> padded token ids: the first model of the ensemble, where the engine reads text alone.

It is copied into the repository as `model.py` and needs `tokenizers` and NumPy, not bertforge, in the server's Python.
`columns` is its twin for an engine that reads columns.

Rows are padded up to the next of the lengths in `settings.json`. They are few where Triton makes one batch of several
requests, for it does so with requests of one shape alone. A request that cannot be answered is refused, and the others
beside it are answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

Read = Callable[[dict[str, list[str]]], dict[str, np.ndarray]]
"""Cells of a request by the input's name, as many of each -> the engine's tensors; raises ValueError for a bad row."""


class TextReader:
    """`{"text": texts}` -> `input_ids` and `attention_mask` `[rows, length]` int64."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds `tokenizer.json` and `settings.json`."""
        settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
        self.rows, self.lengths = settings["rows"], settings["lengths"]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.lengths[-1])
        self.tokenizer.no_padding()

    def __call__(self, given: dict[str, list[str]]) -> dict[str, np.ndarray]:
        """Raises ValueError for a text that is blank, and for more rows than one request may have."""
        check_texts(given["text"], self.rows)
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(given["text"])]
        longest = max(map(len, ids))
        input_ids = np.zeros((len(ids), next(length for length in self.lengths if length >= longest)), np.int64)
        mask = np.arange(input_ids.shape[1]) < np.array([[len(row)] for row in ids])  # [rows, length]
        input_ids[mask] = np.concatenate(ids)
        return {"input_ids": input_ids, "attention_mask": mask.astype(np.int64)}


def check_texts(texts: Sequence[str], most: int) -> None:
    """Raises ValueError for more than `most` rows or none, and for a row without text."""
    if not 1 <= len(texts) <= most:
        raise ValueError(f"the request holds {len(texts)} rows; send 1 to {most}")
    for row, text in enumerate(texts):
        if not text or text.isspace():
            raise ValueError(f"row {row} has no text, and so no label; leave it out")


def cells_of(arrays: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """The strings of each input `[rows]` of bytes; raises ValueError for other bytes than UTF-8, and unequal rows."""
    (first, rows), *others = ((name, len(array)) for name, array in arrays.items())
    for name, count in others:
        if count != rows:
            raise ValueError(f"input {first} holds {rows} rows, but {name} holds {count}; send as many of each")
    cells: dict[str, list[str]] = {}
    for name, array in arrays.items():
        cells[name] = []
        for row, value in enumerate(array):
            try:
                cells[name].append(value.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"row {row} of input {name} is not UTF-8 ({error.reason}); encode it so") from error
    return cells


def respond(requests: Sequence[Any], read: Read, names: Sequence[str]) -> list[Any]:
    """A response to each of Triton's requests: the tensors that `read` makes of its inputs `names`, or why it made
    none."""
    import triton_python_backend_utils as triton

    responses = []
    for request in requests:
        arrays = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        try:
            tensors = [triton.Tensor(name, array) for name, array in read(cells_of(arrays)).items()]
            responses.append(triton.InferenceResponse(tensors))
        except ValueError as error:
            refusal = triton.TritonError(str(error), triton.TritonError.INVALID_ARG)
            responses.append(triton.InferenceResponse(error=refusal))
    return responses


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Standard."""
        self.read = TextReader(Path(args["model_repository"], args["model_version"]))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Standard."""
        return respond(requests, self.read, ["text"])
