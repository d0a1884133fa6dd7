"""From probabilities to decisions: thresholds chosen on validation rows, and a person for the rows between them.

The rule. A row gets its most probable label if that label's probability reaches the label's threshold. With two labels,
one that misses its threshold leaves the row to the other label, if that reaches its own: thresholds of 0.3 and 0.7 make
"closed from 0.3 on, else open". A row whose label misses goes to a person (ABSTAIN).

For a wanted precision, rows are ranked by their probability, and thresholds are tried from above, each more rows than
the one before, until one's rows no longer show the precision with 95% confidence (`binomial`). To take the lowest of
all that show it would not keep the promise: there are as many to try as rows, and where precision hardly falls with the
rank, one that is 0.1% short of the target is promised in 20 to 40% of the choices. A fixed order that ends at the first
failure needs no correction (fixed-sequence testing; Angelopoulos et al. 2021, "Learn then Test", arXiv:2110.01052), as
long as the labels have no part in the order. So it begins where the model's own probabilities make the precision
surest. These may be off, so it also begins nearer the top, and both share the 5%: what the first one has left when it
arrives at the second is added there (Wiens 2003, the fallback procedure). In 80 simulated choices each, from 1,000 and
4,000 rows for 80, 90 and 95%, calibrated or not, the precision on new rows was below the target in 0 to 4% of them, and
in 1 to 7% where precision is flat. Of the rows above the best threshold that there is, 82 to 91% were found from 4,000
rows for 80 and 90%; by the lowest that shows it, some 1% more.

For costs there is nothing to search for: the cheapest decision follows from calibrated probabilities (Chow 1970; Elkan
2001, section 2). To say label l where it is wrong costs c[l], so it costs c[l] (1 - p[l]) on average; to ask a person
costs the same for every row. So l is said from 1 - person / c[l] on. A threshold read off the costs of validation rows
follows their noise: of Stack Overflow's questions, where a wrong "closed" costs 5, thresholds read off 300, 1,000 and
4,487 of them made 4,000 others 3.6, 1.1 and 0.4% dearer than these. The rows tell what the decisions cost, and whether
the probabilities may be used so (`bias`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.evaluation.binomial import CONFIDENCE, at_least, lower_bound
from bertforge.evaluation.bootstrap import Estimate, estimate, resample_weights
from bertforge.evaluation.groups import wilson_interval

ABSTAIN = "abstain"
_NOBODY = -1  # in arrays of labels
_TOP = 3  # times the fewest rows that can show a precision, so that some may be wrong
_SURPRISE = 3.0  # standard errors by which mean probabilities may differ from shares
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Policy:
    """Thresholds, one a label: what a folder's manifest keeps as `decision`, less what was measured."""

    labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    """From which probability on each label is said: 0 always where it is the most probable one, above 1 never."""
    prior: tuple[float, ...] | None = None
    """The shares of the labels that the probabilities must be corrected for; None for those of training."""

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self | None:
        """What the manifest of a folder keeps; None where no thresholds were chosen."""
        if (kept := manifest.get("decision")) is None:
            return None
        labels = tuple(manifest["labels"])
        try:
            thresholds, prior = kept["thresholds"], kept["prior"]
            return cls(
                labels,
                tuple(float(thresholds[name]) for name in labels),
                None if prior is None else tuple(float(prior[name]) for name in labels),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the folder's thresholds are damaged ({error!r}); choose them anew") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; labels by name."""
        prior = None if self.prior is None else dict(zip(self.labels, self.prior, strict=True))
        return {"thresholds": dict(zip(self.labels, self.thresholds, strict=True)), "prior": prior}

    def decide(self, probabilities: npt.ArrayLike) -> Ints:
        """The number of the label for each row of `probabilities` `[rows, labels]`, -1 for a person; NaN is -1 too."""
        chances = np.asarray(probabilities)
        rows, best = np.arange(len(chances)), chances.argmax(axis=1)
        reached = chances >= np.asarray(self.thresholds)  # [rows, labels]
        if len(self.labels) == 2:
            best = np.where(reached[rows, best], best, 1 - best)
        return np.where(reached[rows, best], best, _NOBODY).astype(np.int64)

    def names(self, decided: Ints, labels: Sequence[Any] | None = None) -> list[Any]:
        """What `decide` found, as names, or as `labels` in their order; ABSTAIN for a person."""
        known = [*(self.labels if labels is None else labels), ABSTAIN]  # which is at -1
        return [known[number] for number in decided.tolist()]


@dataclass(frozen=True)
class Answers:
    """How one label is answered on some rows. Shares are between 0 and 1."""

    label: str
    threshold: float
    rows: int
    """That are given the label."""
    right: int
    precision: float | None
    """None where no row is given the label."""
    at_least: float | None
    """The precision's lower bound, one-sided, at 95%."""
    recall: Estimate


@dataclass(frozen=True)
class Outcome:
    """What a policy does to some rows with known labels."""

    rows: int
    coverage: Estimate
    """Share of the rows that are not sent to a person."""
    precision: float | None
    """Of all answers together; None where there is none."""
    at_least: float | None
    answers: tuple[Answers, ...]
    cost: Estimate | None = None
    """Of a row on average, where costs are known."""
    cost_undecided: Estimate | None = None
    """The same for the most probable label, without thresholds."""

    head: ClassVar = ("answer", "from", "rows", "right", "precision", "lower bound", "recall (95% interval)")

    def table(self) -> list[tuple[str, ...]]:
        """The cells under `head`: each label, then all answers together."""
        rows = [
            (a.label, _threshold(a.threshold), *_cells(a.rows, a.right, a.precision, a.at_least), _interval(a.recall))
            for a in self.answers
        ]
        given, right = sum(a.rows for a in self.answers), sum(a.right for a in self.answers)
        return [*rows, ("all answers", "", *_cells(given, right, self.precision, self.at_least), "")]

    @property
    def told(self) -> str:
        """What the table does not say, in one line."""
        asked = self.rows - sum(a.rows for a in self.answers)
        told = f"{_interval(self.coverage)} of {self.rows:,} rows are answered, {asked:,} go to a person"
        if self.cost and self.cost_undecided:
            told += f"; a row costs {_cost(self.cost)}, and {_cost(self.cost_undecided)} by its most probable label"
        return told

    def markdown(self) -> str:
        """The table, and the line under it."""
        cells = [self.head, ("---",) * len(self.head), *self.table()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        return "\n".join([*lines, "", self.told])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def for_precision(
    probabilities: npt.ArrayLike, true: Ints, labels: Sequence[str], wanted: Mapping[str, float]
) -> Policy:
    """Thresholds of the highest recall at which answers have the `wanted` precision, with 95% confidence.

    `wanted` names labels, or "" for all answers together, which then share one threshold. With two labels and one of
    them named, the other is said wherever that one is not. Otherwise a label is said where it is the most probable one,
    and an answer below its threshold goes to a person; a label that is not named is always said.

    Raises UsageError as `check_precisions` does, DataError where no threshold reaches it, with the best that there is.
    """
    check_precisions(labels, wanted)
    chances = np.asarray(probabilities, np.float64)
    best = chances.argmax(axis=1)
    if "" in wanted:
        top = chances.max(axis=1)
        threshold = _smallest(top, best == true, wanted[""], "answers")
        return Policy(tuple(labels), (threshold,) * len(labels))
    thresholds, rest = [0.0] * len(labels), len(labels) == 2 and len(wanted) == 1  # the other gets the rest
    for name, precision in wanted.items():
        label = list(labels).index(name)
        ranked = np.arange(len(true)) if rest else np.flatnonzero(best == label)
        right = true[ranked] == label
        thresholds[label] = _smallest(chances[ranked, label], right, precision, f"answers {name!r}")
    if rest:
        label = list(labels).index(next(iter(wanted)))
        thresholds[1 - label] = 1 - thresholds[label]
    return Policy(tuple(labels), tuple(thresholds))


def check_precisions(labels: Sequence[str], wanted: Mapping[str, float]) -> None:
    """Raises UsageError for an unknown label, and for a precision that is none."""
    for name, precision in wanted.items():
        if name and name not in labels:
            raise UsageError(f"precision names the label {name!r}, but the model knows {', '.join(labels)}")
        if not 0 < precision < 1:
            raise UsageError(f"precision {precision:g} must lie between 0 and 1, such as 0.95")
    if "" in wanted and len(wanted) > 1:
        raise UsageError("give one precision for all answers, or one for each label that you name, not both")


def _smallest(scores: Floats, right: npt.NDArray[np.bool_], precision: float, what: str) -> float:
    """The smallest threshold on `scores` `[rows]` down to which those above it are `right` often enough."""
    if not len(scores):
        raise DataError(f"no validation row gets {what}, so no threshold can be chosen for them")
    order = np.argsort(-scores, kind="stable")
    descending, count = scores[order], np.cumsum(right[order], dtype=np.int64)
    ends = np.flatnonzero(np.r_[descending[1:] < descending[:-1], True])
    rows, hits = ends + 1, count[ends]  # at each distinct score
    starts = _starts(np.cumsum(descending)[ends] / rows, rows, precision)
    share = (1 - CONFIDENCE) / len(starts)
    chances, level, shown = at_least(hits, rows, precision), 0.0, -1
    for place in range(starts[0], len(ends)):
        level += share * (place in starts)
        if level and chances[place] <= level:
            shown = place
        else:
            level = 0.0
    if shown < 0:
        bounds = lower_bound(hits[starts], rows[starts], 1 - share)
        best = starts[int(bounds.argmax())]
        raise DataError(
            f"no threshold gives {what} a precision of {precision:.4g} with {CONFIDENCE:.0%} confidence; the best is "
            f"{bounds.max():.4g}, from {descending[ends[best]]:.4g} on, where {hits[best]:,} of {rows[best]:,} "
            f"validation rows are right; ask for less, or take more validation rows ({_fewest(precision):,} at least, "
            "all of them right)"
        )
    last = int(ends[shown])
    return float((descending[last] + descending[last + 1]) / 2 if last + 1 < len(descending) else descending[last])


def _starts(expected: Floats, rows: Ints, precision: float) -> list[int]:
    """Where to begin among `rows` `[places]`, whose labels the model itself expects to be right in `expected` of them.

    Where they are most likely to show the precision by that, and at some multiple of the fewest that can.
    """
    margin = np.where(rows < _fewest(precision), -np.inf, (expected - precision) * np.sqrt(rows))
    top = np.searchsorted(rows, _TOP * _fewest(precision))
    return sorted({int(margin.argmax()), min(int(top), len(rows) - 1)})


def _fewest(precision: float) -> int:
    """Rows that must all be right to show a precision."""
    return int(np.ceil(np.log(1 - CONFIDENCE) / np.log(precision)))


def for_costs(labels: Sequence[str], costs: Mapping[str, float], person: float | None) -> Policy:
    """The cheapest thresholds, where a wrong answer of a label costs `costs` of it (1 if it is not named) and `person`
    is what a person costs; None asks no person.

    Raises UsageError for an unknown label, costs that are not above 0, a person who costs so much that nobody would be
    asked, and for more than two labels where the cheapest decision is no matter of a threshold for each.
    """
    if unknown := [name for name in costs if name not in labels]:
        raise UsageError(f"cost names the label {unknown[0]!r}, but the model knows {', '.join(labels)}")
    if any(not 0 < cost < np.inf for cost in (*costs.values(), *([] if person is None else [person]))):
        raise UsageError("costs must be above 0, such as --cost closed=5 --abstain 0.5")
    each = [costs.get(name, 1.0) for name in labels]
    if len(labels) == 2:
        if person is None:
            return Policy(tuple(labels), tuple(cost / sum(each) for cost in each))
        _check_person(person, each[0] * each[1] / sum(each))
        return Policy(tuple(labels), tuple(1 - person / cost for cost in each))
    if person is None:
        raise UsageError(
            f"costs of {len(labels)} labels are weighed against a person's; say what asking one costs: --abstain 0.5"
        )
    if len(set(each)) > 1 and person > min(each) / 2:
        raise UsageError(
            f"where wrong answers of {len(labels)} labels cost differently, a person may cost half of the cheapest at "
            f"most, {min(each) / 2:g}; --abstain is {person:g}"
        )
    _check_person(person, min(each) * (1 - 1 / len(labels)))
    return Policy(tuple(labels), tuple(1 - person / cost for cost in each))


def _check_person(cost: float, most: float) -> None:
    """`most` is what an answer costs on average where every label is as likely to be wrong: more is never paid."""
    if cost >= most:
        raise UsageError(
            f"--abstain {cost:g} is never worth it, so nobody would be asked: with these costs a person must cost less "
            f"than {most:.4g}; give less, or leave --abstain out"
        )


def outcome(
    policy: Policy,
    probabilities: npt.ArrayLike,
    true: Ints,
    costs: Mapping[str, float] | None = None,
    person: float | None = None,
) -> Outcome:
    """What `policy` does to rows with `probabilities` `[rows, labels]` and the labels `true` `[rows]`, not empty."""
    chances = np.asarray(probabilities)
    decided = policy.decide(chances)
    answered, right = decided != _NOBODY, decided == true
    answers = []
    for label, name in enumerate(policy.labels):
        given, hits = decided == label, right & (decided == label)
        answers.append(
            Answers(
                name,
                policy.thresholds[label],
                int(given.sum()),
                int(hits.sum()),
                *_precision(hits.sum(), given.sum()),
                recall=_share(hits.sum(), (true == label).sum(), f"no row has the label {name!r}"),
            )
        )
    cost = undecided = None
    if costs is not None:
        each = np.array([*(costs.get(name, 1.0) for name in policy.labels), person or 0.0])
        cost = _mean(np.where(right, 0.0, each[decided]))
        best = chances.argmax(axis=1)
        undecided = _mean(np.where(best == true, 0.0, each[best]))
    return Outcome(
        len(true),
        _share(answered.sum(), len(true), ""),
        *_precision(right.sum(), answered.sum()),
        tuple(answers),
        cost,
        undecided,
    )


def bias(probabilities: npt.ArrayLike, true: Ints, labels: Sequence[str]) -> str:
    """What is wrong with probabilities of which costs are to be reckoned, in one line; "" where nothing shows.

    Calibrated probabilities of a label have the mean of its share. A temperature cannot repair it where they do not, as
    after training with class weights.
    """
    chances = np.asarray(probabilities, np.float64)
    error = np.sqrt((chances * (1 - chances)).sum(axis=0)) / len(chances)  # [labels], of the mean
    gaps = chances.mean(axis=0) - np.bincount(true, minlength=len(labels)) / len(true)
    label = int(np.abs(gaps / np.maximum(error, 1e-12)).argmax())
    if abs(gaps[label]) <= _SURPRISE * error[label]:
        return ""
    share = (true == label).mean()
    return (
        f"the probabilities of {labels[label]!r} are {chances[:, label].mean():.2%} on average, where {share:.2%} of "
        f"the rows have the label, so thresholds from costs are wrong; give --prior {labels[label]}={share:.4g}"
    )


def _threshold(value: float) -> str:
    return "any" if value <= 0 else "never" if value > 1 else f"{value:.4f}"


def _cells(rows: int, right: int, precision: float | None, at_least: float | None) -> tuple[str, ...]:
    return (f"{rows:,}", f"{right:,}", *("-" if share is None else f"{share:.2%}" for share in (precision, at_least)))


def _interval(share: Estimate) -> str:
    if share.value is None or share.low is None or share.high is None:
        return share.reason
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _cost(found: Estimate) -> str:
    value = f"{found.value:.4g}"
    return value if found.low is None else f"{value} ({found.low:.4g} to {found.high:.4g})"


def _precision(right: int, rows: int) -> tuple[float | None, float | None]:
    """With its lower bound."""
    if not rows:
        return None, None
    return float(right / rows), float(lower_bound(np.array([right]), np.array([rows]))[0])


def _share(part: int, rows: int, undefined: str) -> Estimate:
    if not rows:
        return Estimate(None, None, None, undefined)
    return Estimate(float(part / rows), *wilson_interval(int(part), int(rows)))


def _mean(values: Floats) -> Estimate:
    samples = np.array([weights @ values / len(values) for weights in resample_weights(len(values), 1000, 42)])
    return estimate(float(values.mean()), samples, len(values))
