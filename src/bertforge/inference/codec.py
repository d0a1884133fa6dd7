"""Rows to what a model reads, and its logits to answers: all of prediction but the model itself.

`Predictor` puts an engine between the two halves. A server's front has the halves alone and the engine in another
process, so this file and what it imports leave torch out: a front then starts in a third of the time, with 120 MB in
the place of 300.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from bertforge.columns.transform import TabularTransform
from bertforge.data.features import require_readable
from bertforge.data.schema import Schema
from bertforge.data.tokens import Tokenizer
from bertforge.errors import DataError, UsageError
from bertforge.evaluation.decisions import Policy
from bertforge.evaluation.prior import as_text, complete_shares, shifts, train_shares
from bertforge.evaluation.scores import softmax
from bertforge.inference.inputs import Given, Inputs, read_inputs


@dataclass(frozen=True)
class Codec:
    """What a folder says of its model's inputs and answers."""

    tokenizer: Tokenizer
    schema: Schema
    transform: TabularTransform | None
    """Makes the arrays of the columns; None for a model that reads the text alone."""
    manifest: dict[str, Any]
    prior: tuple[float, ...] | None = None
    """The shares of the labels where the model is used, which probabilities are corrected for; None: as in training."""
    policy: Policy | None = None
    """Makes decisions of probabilities; None where no thresholds were chosen."""

    @classmethod
    def load(cls, directory: Path, manifest: dict[str, Any], prior: Mapping[str, float] | None = None) -> Self:
        """Of a run, a model or an engine, as `served` gives them.

        `prior` names labels with their shares where the model is used; see `complete_shares` for the others. Where
        thresholds were chosen for other shares than those of training, these are taken without being named.

        Raises ArtifactError for a damaged tokenizer and for a prior where the folder does not tell the train shares,
        UsageError for a prior that the thresholds were not chosen for.
        """
        transform = None if manifest["tabular"] is None else TabularTransform.from_dict(manifest["tabular"])
        policy, labels = Policy.of(manifest), tuple(manifest["labels"])
        shares = policy.prior if policy else None
        if prior is not None:
            shares = complete_shares(prior, labels, train_shares(manifest))
            if policy and (policy.prior is None or not np.allclose(policy.prior, shares)):
                chosen = "those of training" if policy.prior is None else as_text(labels, policy.prior)
                raise UsageError(
                    f"the thresholds of {directory} were chosen for other shares of the labels, {chosen}, than "
                    f"{as_text(labels, shares)}; choose them anew with the same --prior, or leave it out"
                )
        schema = Schema.from_dict(manifest["schema"])
        return cls(Tokenizer.load(directory), schema, transform, manifest, shares, policy)

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

    @cached_property
    def shifts(self) -> np.ndarray:
        """What the prior adds to each logit, `[labels]` float32; 0 without one."""
        if self.prior is None:
            return np.zeros(len(self.label_names), np.float32)
        return shifts(train_shares(self.manifest), self.prior).astype(np.float32)

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """The logits `[rows, labels]` whose softmax is served: divided by the temperature, corrected for the prior."""
        scaled: np.ndarray = logits / np.float32(self.temperature) + self.shifts
        return scaled

    def probabilities(self, texts: list[str], logits: np.ndarray) -> np.ndarray:
        """`[rows, labels]` float32 of logits of that shape; NaN for a row without text."""
        chances = softmax(self.calibrated(logits))
        chances[[is_blank(text) for text in texts]] = np.nan
        return chances

    def labelled(self, chances: np.ndarray, index: pd.Index) -> pd.DataFrame:
        """The frame that `Predictor.predict` returns, of `probabilities`: with decisions where there is a policy."""
        names = self.schema.original_labels()
        blank = np.isnan(chances).any(axis=1)  # [rows]
        labels: Any = np.array(names, dtype=object if isinstance(names[0], str) else None)[chances.argmax(axis=1)]
        if blank.any():  # beside None, pandas would make 1 a 1.0
            labels = labels.astype(object)
            labels[blank] = None
            labels = pd.Series(labels, dtype=object).array
        decisions = {} if self.policy is None else {"decision": self._decisions(self.policy, chances, blank)}
        return pd.DataFrame(
            {
                "label": labels,
                "probability": chances.max(axis=1),
                **{f"p_{name}": chances[:, column] for column, name in enumerate(self.label_names)},
                **decisions,
            },
            index=index,
        )

    def _decisions(self, policy: Policy, chances: np.ndarray, blank: np.ndarray) -> Any:
        """A label, "abstain", or None for a row without text, each."""
        names = policy.names(policy.decide(chances), self.schema.original_labels())
        decided = [None if no_text else name for name, no_text in zip(names, blank, strict=True)]
        return pd.Series(decided, dtype=object).array


def is_blank(text: str) -> bool:
    """Whether a row has no text, and so no label."""
    return not text or text.isspace()
