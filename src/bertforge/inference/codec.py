"""Rows to what a model reads, and its logits to answers: all of prediction but the model itself.

`Predictor` puts an engine between the two halves. A server's front has the halves alone and the engine in another
process, so this file and what it imports leave torch out: a front then starts in a third of the time, with 120 MB in
the place of 300.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from bertforge.columns.transform import TabularTransform
from bertforge.data.features import require_readable
from bertforge.data.schema import Schema
from bertforge.data.tokens import Tokenizer
from bertforge.errors import DataError
from bertforge.inference.inputs import Given, Inputs, read_inputs


@dataclass(frozen=True)
class Codec:
    """What a folder says of its model's inputs and answers."""

    tokenizer: Tokenizer
    schema: Schema
    transform: TabularTransform | None
    """Makes the arrays of the columns; None for a model that reads the text alone."""
    manifest: dict[str, Any]

    @classmethod
    def load(cls, directory: Path, manifest: dict[str, Any]) -> Self:
        """Of a run, a model or an engine, as `served` gives them; raises ArtifactError for a damaged tokenizer."""
        return cls(
            tokenizer=Tokenizer.load(directory),
            schema=Schema.from_dict(manifest["schema"]),
            transform=None if manifest["tabular"] is None else TabularTransform.from_dict(manifest["tabular"]),
            manifest=manifest,
        )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names in the order of the logits."""
        return tuple(self.manifest["labels"])

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities; fitted on validation rows in training."""
        return float(self.manifest.get("temperature", 1.0))

    @property
    def max_length(self) -> int:
        """Tokens a text is cut to."""
        return int(self.manifest["recipe"]["max_length"])

    def read(self, rows: Given, columns: pd.DataFrame | None = None) -> Inputs:
        """The texts and columns of `rows`; see `read_inputs`, also for what it raises."""
        return read_inputs(rows, columns, self.schema, self.transform)

    def arrays(self, columns: pd.DataFrame | None) -> dict[str, np.ndarray] | None:
        """What the model reads beside the text, `[rows, width]` for each kind of column; None where it reads nothing.

        Raises DataError for a column that is missing.
        """
        if self.transform is None:
            return None
        if columns is None:
            raise DataError(f"this model reads columns beside the text: {', '.join(self.transform.spec.columns)}")
        require_readable(self.transform.spec.columns, list(columns.columns))
        return self.transform(columns)

    def probabilities(self, texts: list[str], logits: np.ndarray) -> np.ndarray:
        """`[rows, labels]` float32 of logits of that shape; NaN for a row without text."""
        scaled = logits / np.float32(self.temperature)
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        chances: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        chances[[is_blank(text) for text in texts]] = np.nan
        return chances

    def labelled(self, chances: np.ndarray, index: pd.Index) -> pd.DataFrame:
        """The frame that `Predictor.predict` returns, of `probabilities`."""
        names = self.schema.original_labels()
        blank = np.isnan(chances).any(axis=1)  # [rows]
        labels: Any = np.array(names, dtype=object if isinstance(names[0], str) else None)[chances.argmax(axis=1)]
        if blank.any():  # beside None, pandas would make 1 a 1.0
            labels = labels.astype(object)
            labels[blank] = None
            labels = pd.Series(labels, dtype=object).array
        return pd.DataFrame(
            {
                "label": labels,
                "probability": chances.max(axis=1),
                **{f"p_{name}": chances[:, column] for column, name in enumerate(self.label_names)},
            },
            index=index,
        )


def is_blank(text: str) -> bool:
    """Whether a row has no text, and so no label."""
    return not text or text.isspace()
