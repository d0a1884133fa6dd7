"""Chooses a folder's thresholds on validation rows, and keeps them in its manifest, where whatever serves it looks.

They are of the probabilities that this folder gives: of an engine in 8 bits those of the engine. Folders that are made
of it later take them along, as they take the temperature.

The temperature was fitted on the same validation rows. That one number for all of them hardly knows a single row, so
the rows still tell what the thresholds do. Test rows choose nothing; `evaluate` shows what became of the promise there.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bertforge.data.prepared import PreparedData
from bertforge.errors import UsageError
from bertforge.evaluation.binomial import CONFIDENCE
from bertforge.evaluation.decisions import (
    ABSTAIN,
    Outcome,
    Policy,
    bias,
    check_precisions,
    for_costs,
    for_precision,
    outcome,
)
from bertforge.evaluation.prior import as_text, complete_shares, train_shares
from bertforge.evaluation.scores import softmax
from bertforge.inference.predictor import Predictor
from bertforge.inference.scoring import score
from bertforge.locks import locked
from bertforge.manifest import DECISION, amend_manifest, served


@dataclass(frozen=True)
class Wanted:
    """What thresholds are chosen for: a precision or costs, one of the two."""

    precision: Mapping[str, float] | None = None
    """Of a label's answers, or under "" of all of them; see `for_precision`."""
    costs: Mapping[str, float] | None = None
    """Of a wrong answer, by its label; see `for_costs`."""
    person: float | None = None
    """What it costs to ask a person; None asks none. Beside costs alone."""
    prior: Mapping[str, float] | None = None
    """The shares of labels where the model is used."""

    def __post_init__(self) -> None:
        if bool(self.precision) == bool(self.costs):
            raise UsageError("say what thresholds are for: either --precision 0.95 or --cost LABEL=COST")
        if self.person is not None and not self.costs:
            raise UsageError(
                "--abstain is what a person costs, beside --cost; with --precision, rows that no threshold reaches go "
                "to a person in any case"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        if self.precision:
            return {"precision": self.precision.get("", dict(self.precision)), "confidence": CONFIDENCE}
        return {"costs": dict(self.costs or {}), "abstain": self.person}


@dataclass(frozen=True)
class Chosen:
    """Thresholds, and what they do to the validation rows that chose them."""

    folder: Path
    """That keeps them: of a folder made by `fit` the one that it serves."""
    policy: Policy
    outcome: Outcome
    source: str
    """The rows, for people."""
    doubts: tuple[str, ...]
    """What may not be meant, and why they should not be trusted; empty where nothing shows."""
    kept: dict[str, Any]
    """The manifest's `decision`, JSON-ready."""


def choose_thresholds(artifact: Path, data: Path, wanted: Wanted) -> Chosen:
    """Writes thresholds into the manifest of a run, model, quantized model, engine or fit.

    `data` is the prepared folder that it was trained on. Raises DataError for other data, and where no threshold
    reaches the wanted precision; UsageError, before anything is computed, for labels and numbers that cannot be;
    ArtifactError as `Predictor.load`.
    """
    folder, manifest = served(artifact)
    with locked(folder):
        PreparedData.of(data, artifact, manifest)  # refuses what `score` would take
        labels = tuple(manifest["labels"])
        if ABSTAIN in labels:
            raise UsageError(f"{ABSTAIN!r} is a label of this model, so no row could be told to go to a person")
        prior = wanted.prior and complete_shares(wanted.prior, labels, train_shares(manifest))
        if wanted.precision:
            check_precisions(labels, wanted.precision)
        else:
            policy = for_costs(labels, wanted.costs or {}, wanted.person)
        predictor = Predictor.load(folder)
        codec = replace(predictor.codec, prior=prior or None, policy=None)
        scored = score(predictor, data, "validation")
        predictor.close()
        if codec.prior:
            scored = scored.having(codec.prior, as_text(labels, codec.prior))
        chances, true = softmax(codec.calibrated(scored.logits)), scored.labels
        if wanted.precision:
            policy = for_precision(chances, true, labels, wanted.precision)
        policy = replace(policy, prior=codec.prior)
        found = outcome(policy, chances, true, wanted.costs or None, wanted.person)
        kept = {
            **policy.to_dict(),
            **wanted.to_dict(),
            "computed_in": predictor.precision,
            "on": scored.source,
            "outcome": found.to_dict(),
        }
        amend_manifest(folder, {**predictor.manifest, DECISION: kept})
    doubts = [
        _dropped(Policy.of(manifest), policy),
        *(_never(answers.label) for answers in found.answers if not answers.rows),
        bias(chances, true, labels) if wanted.costs else "",
    ]
    return Chosen(folder, policy, found, scored.source, tuple(filter(None, doubts)), kept)


def _never(label: str) -> str:
    return f"no validation row is given the label {label!r} by these thresholds; see whether that is what you want"


def _dropped(before: Policy | None, now: Policy) -> str:
    if before is None or before.prior is None or now.prior is not None:
        return ""
    shares = as_text(before.labels, before.prior)
    named = zip(before.labels[1:], before.prior[1:], strict=True)  # the first one has the rest
    again = " ".join(f"--prior {shlex.quote(f'{label}={share:.4g}')}" for label, share in named)
    return (
        f"the thresholds before were for shares of {shares}; these are for those of training, and probabilities are "
        f"no longer corrected; to keep the shares, choose again with {again}"
    )
