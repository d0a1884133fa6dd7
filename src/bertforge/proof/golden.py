"""Golden rows: inputs with the logits they gave when the model was saved.

They travel in `bertforge.json` as token ids and columns (null for a number that is missing), so that whoever loads the
model, merges it or later compiles it can show that it still computes the same function, without the data set. The same
rows as they stood in the table travel beside them, as `inputs`, so that the way from there is shown too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from torch import nn

from bertforge.columns.registry import KINDS
from bertforge.data.loader import Examples, spread
from bertforge.data.tokens import TokenStore
from bertforge.evaluation.logits import predict_logits

ROWS = 16


@dataclass(frozen=True)
class GoldenRows:
    """A few rows of mixed length, and reference logits `[rows, labels]` in float32."""

    examples: Examples
    logits: np.ndarray

    @classmethod
    def record(cls, model: nn.Module, examples: Examples, rows: np.ndarray) -> Self:
        """Takes `spread_rows` and runs them in float32."""
        chosen = spread_rows(examples, rows)
        lengths = examples.lengths(chosen)
        batch, _ = examples.pack(chosen)
        kept = Examples(
            tokens=TokenStore(batch.input_ids.numpy(), np.concatenate([[0], np.cumsum(lengths)])),
            labels=np.full(len(chosen), -1),
            sep_id=examples.sep_id,
            max_length=examples.max_length,
            tabular=examples.tabular and {name: array[chosen] for name, array in examples.tabular.items()},
        )
        return cls(kept, predict_logits(model, kept, np.arange(len(chosen)), "fp32"))

    def of(self, model: nn.Module) -> Self:
        """The same rows with the logits of another model, in float32."""
        return replace(self, logits=predict_logits(model, self.examples, np.arange(len(self.logits)), "fp32"))

    def difference(self, model: nn.Module) -> float:
        """The largest |logit - reference| over all rows, in float32."""
        found = predict_logits(model, self.examples, np.arange(len(self.logits)), "fp32")
        return float(np.abs(found - self.logits).max())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        tokens, tabular = self.examples.tokens, self.examples.tabular
        return {
            "input_ids": tokens.ids.tolist(),
            "offsets": tokens.offsets.tolist(),
            "sep_id": self.examples.sep_id,
            "max_length": self.examples.max_length,
            "tabular": None if tabular is None else {name: _nulls(array) for name, array in tabular.items()},
            "logits": self.logits.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        rows, tabular = len(values["logits"]), values["tabular"]
        return cls(
            Examples(
                tokens=TokenStore(np.array(values["input_ids"]), np.array(values["offsets"])),
                labels=np.full(rows, -1),
                sep_id=values["sep_id"],
                max_length=values["max_length"],
                tabular=tabular
                and {name: np.array(given, KINDS[name].dtype).reshape(rows, -1) for name, given in tabular.items()},
            ),
            np.array(values["logits"], np.float32),
        )


def spread_rows(examples: Examples, rows: np.ndarray) -> np.ndarray:
    """Some of `rows`, spread evenly over their lengths, shortest first."""
    by_length = rows[np.argsort(examples.lengths(rows), kind="stable")]
    return spread(by_length, ROWS)


def _nulls(array: np.ndarray) -> list[Any]:
    """Nested lists with None for NaN, which JSON does not know; `np.array` turns it back."""
    values = array.astype(object)
    values[np.isnan(array)] = None
    return list(values.tolist())
