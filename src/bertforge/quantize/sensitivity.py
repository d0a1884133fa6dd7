"""What quantization costs, layer by layer and component by component, and which part of it a budget can pay for.

Cost is the mean Kullback-Leibler divergence of the quantized model's probabilities from the plain model's, in nats: it
moves with every logit, where accuracy on a few hundred rows moves only when a label does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bertforge.evaluation.scores import log_softmax
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import Unit, share_of_work
from bertforge.quantize.fake import quantize_only

Logits = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Cost:
    """Of one assignment of precisions, on the judge's rows."""

    divergence: float
    """Nats."""
    accuracy_drop: float
    """Fraction of the rows; below 0 when the quantized model is better."""
    changed_labels: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Judge:
    """Rows with the plain model's logits of them; asks the model for its logits as its quantizers stand."""

    logits: Logits
    reference: np.ndarray
    """[rows, labels], of the plain model."""
    labels: np.ndarray
    """[rows]."""

    def cost(self) -> Cost:
        """Of the model as it is now."""
        found = self.logits()
        before, after = log_softmax(self.reference), log_softmax(found)
        right = [(logits.argmax(1) == self.labels).mean() for logits in (self.reference, found)]
        return Cost(
            divergence=float((np.exp(before) * (before - after)).sum(1).mean()),
            accuracy_drop=float(right[0] - right[1]),
            changed_labels=int((self.reference.argmax(1) != found.argmax(1)).sum()),
        )


@dataclass(frozen=True)
class Sensitivity:
    """One row of the table: a layer or a component."""

    name: str
    work: float
    """Share of the encoder's multiply-adds."""
    alone: Cost
    """When only it is quantized."""
    spared: Cost
    """When all but it is quantized."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """A point of the frontier: which units are in 8 bits, and what that costs."""

    quantized: tuple[Unit, ...]
    work: float
    """Share of the encoder's multiply-adds in 8 bits."""
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"quantized": [asdict(unit) for unit in self.quantized], "work": self.work, "cost": self.cost.to_dict()}


def table(
    model: BertForSequenceClassification,
    chosen: list[Unit],
    judge: Judge,
    length: float,
    done: Callable[[int, int], object],
) -> list[Sensitivity]:
    """A row a layer, then a row a component; `done(measured, of)` tells how far it is. `length` is tokens a row."""
    groups = {f"layer {layer}": [u for u in chosen if u.layer == layer] for layer in sorted({u.layer for u in chosen})}
    groups |= {
        component: [u for u in chosen if u.component == component]
        for component in dict.fromkeys(u.component for u in chosen)
    }
    rows = []
    for count, (name, members) in enumerate(groups.items()):
        done(2 * count, 2 * len(groups))
        alone = _cost(model, members, judge)
        done(2 * count + 1, 2 * len(groups))
        spared = _cost(model, [unit for unit in chosen if unit not in members], judge)
        rows.append(Sensitivity(name, share_of_work(model.config, members, length), alone, spared))
    return rows


def search(
    model: BertForSequenceClassification,
    chosen: list[Unit],
    judges: tuple[Judge, Judge],
    length: float,
    max_drop: float,
    done: Callable[[int, int], object],
) -> list[Step]:
    """Takes units back to full precision until the accuracy drop is within `max_drop`, a fraction: the last step is.

    The first of `judges` ranks the units, each quantized alone, by cost over the work it saves; the second, with more
    rows, says whether the budget holds. With everything taken back there is nothing left to give: that is the end too.
    """
    ranking, verdict = judges
    harm = {}
    for count, unit in enumerate(chosen):
        done(count, len(chosen))
        harm[unit] = _cost(model, [unit], ranking).divergence / unit.work(model.config, length)
    kept = sorted(chosen, key=lambda unit: harm[unit])  # the last is the next to go
    frontier = []
    while True:
        step = Step(tuple(kept), share_of_work(model.config, kept, length), _cost(model, kept, verdict))
        frontier.append(step)
        if step.cost.accuracy_drop <= max_drop or not kept:
            return frontier
        kept = kept[:-1]


def _cost(model: BertForSequenceClassification, members: list[Unit], judge: Judge) -> Cost:
    quantize_only(model, members)
    return judge.cost()
