"""Where a model stands beside the baselines: their accuracy on the same rows, the paired difference, and one sentence.

The sentence is the point. A run whose loss fell looks like a success until it is said that counting words does better,
or that the model gives every row the same label.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bertforge.data.prepared import PreparedData
from bertforge.errors import ArtifactError
from bertforge.evaluation.baselines import INSTALL, MAJORITY, TEXT, Baseline, baselines
from bertforge.evaluation.bootstrap import Estimate
from bertforge.evaluation.compare import compare
from bertforge.evaluation.metrics import macro_f1

if TYPE_CHECKING:
    from bertforge.columns.transform import TabularSpec


@dataclass(frozen=True)
class Rival:
    """A baseline and the model on the rows that the baseline was asked about. Shares, not percentages."""

    name: str
    rows: int
    accuracy: float
    macro_f1: float
    model_accuracy: float
    lead: Estimate
    """The model's accuracy less this one's, row by row."""
    train_rows: int
    seconds: float

    @property
    def about(self) -> str:
        """Its name, and where something was fitted, on how much and for how long."""
        if self.name == MAJORITY:
            return self.name
        return f"{self.name}, fitted on {self.train_rows:,} rows in {self.seconds:.0f} s"


@dataclass(frozen=True)
class Standing:
    """A model beside its baselines on one part of a split."""

    part: str
    rows: int
    accuracy: float
    macro_f1: float
    only_label: str | None
    """The label the model gives to every row, if it gives only one."""
    rivals: tuple[Rival, ...]
    """The most frequent label first."""

    @property
    def best(self) -> Rival:
        """The most accurate baseline."""
        return max(self.rivals, key=lambda rival: rival.accuracy)

    @property
    def learnt_nothing(self) -> bool:
        """Whether the model gives one label only, or is not shown to be better than always giving one."""
        return self.only_label is not None or not _is_ahead(self.rivals[0])

    @property
    def is_ahead(self) -> bool:
        """Whether the model is shown to be better than every baseline."""
        return not self.learnt_nothing and _is_ahead(self.best)

    @property
    def verdict(self) -> str:
        """One line on what to make of the figures."""
        if self.only_label is not None:
            return f"the model gives all {self.rows:,} rows the same label, {self.only_label!r}: it has learnt nothing"
        rival = self.rivals[0] if self.learnt_nothing else self.best
        how = "beats" if _is_ahead(rival) else "is not clearly better than"
        if (rival.lead.value or 0.0) <= 0:
            how = "does not beat"
        return (
            f"the model {how} {rival.name}: {rival.model_accuracy:.1%} beside {rival.accuracy:.1%}, "
            f"difference {_points(rival.lead)}"
        )

    @property
    def missing(self) -> str:
        """What was not fitted for want of scikit-learn, and what installs it; empty when nothing is missing."""
        fitted = any(rival.name == TEXT for rival in self.rivals)
        return "" if fitted else f"no {TEXT} was fitted beside the model, for scikit-learn is missing: {INSTALL}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"rivals": [asdict(r) | {"lead": r.lead.to_dict()} for r in self.rivals]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Reads what `to_dict` wrote; raises ArtifactError when it is something else."""
        try:
            rivals = [Rival(**rival | {"lead": Estimate.from_dict(rival["lead"])}) for rival in fields["rivals"]]
            return cls(**fields | {"rivals": tuple(rivals)})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{fields!r} does not say how a model stands beside baselines; train again") from error

    def table(self) -> list[tuple[str, str, str, str]]:
        """Name, accuracy, macro F1 and the model's lead with its interval, as text: the model, then the baselines."""
        ours = ("the model", f"{self.accuracy:.1%}", f"{self.macro_f1:.1%}", "")
        return [ours, *((r.about, f"{r.accuracy:.1%}", f"{r.macro_f1:.1%}", _points(r.lead)) for r in self.rivals)]

    def markdown(self) -> str:
        """The table and the sentences under it."""
        head = (f"on {self.rows:,} {self.part} rows", "accuracy", "macro F1", "lead of the model (95% interval)")
        lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * 4, *self.table())]
        return "\n".join([*lines, "", self.verdict, *filter(None, [self.missing])])


def standing(data: PreparedData, split: str, part: str, columns: TabularSpec | None, logits: np.ndarray) -> Standing:
    """The model with `logits` `[rows, labels]` on the rows of a part ("validation" or "test") beside the baselines."""
    rows, names = data.rows(split, part), data.label_names
    labels, predicted = np.asarray(data.labels)[rows], logits.argmax(axis=1)
    given = np.unique(predicted)
    return Standing(
        part=part,
        rows=len(rows),
        accuracy=float((predicted == labels).mean()),
        macro_f1=macro_f1(labels, predicted, len(names)),
        only_label=names[given[0]] if len(given) == 1 else None,
        rivals=tuple(_rival(baseline, rows, labels, logits) for baseline in baselines(data, split, columns)),
    )


def _rival(baseline: Baseline, rows: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> Rival:
    _, ours, theirs = np.intersect1d(rows, baseline.rows, return_indices=True)
    answers = np.log(baseline.probabilities[theirs].clip(1e-9))  # [rows asked of both, labels]
    found = compare(answers, logits[ours], labels[ours])
    return Rival(
        name=baseline.name,
        rows=found.rows,
        accuracy=found.first_accuracy,
        macro_f1=macro_f1(labels[ours], answers.argmax(axis=1), logits.shape[1]),
        model_accuracy=found.second_accuracy,
        lead=found.accuracy_difference,
        train_rows=baseline.train_rows,
        seconds=baseline.seconds,
    )


def _is_ahead(rival: Rival) -> bool:
    return rival.lead.low is not None and rival.lead.low > 0


def _points(lead: Estimate) -> str:
    """`+2.9 points (+1.2 to +4.6)`."""
    value = f"{100 * (lead.value or 0.0):+.1f} points"
    return (
        value if lead.low is None or lead.high is None else f"{value} ({100 * lead.low:+.1f} to {100 * lead.high:+.1f})"
    )
