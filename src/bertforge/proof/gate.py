"""The verdict on an engine: is it its model, up to what its precision does to it?

Three questions, each with its own rows and its own kind of answer.

1. Structure (`structure`): is every part of the model there? Asked where nothing is rounded, answered exactly.
2. Shift: do its probabilities move as its precision moves them in simulation, on average and in the worst row, and are
   the labels still the model's, but for a few? Asked of rows that stand alone, and of a crowd, for padding and
   neighbours must change nothing. The simulation knows nothing of the engine's own ranges, which may be what is wrong.
3. Accuracy: is any shown to be lost? The difference is paired, row by row, and has an interval. Two rows of 500 show
   nothing, and neither does a point.

An engine is refused for what is shown. Where the rows cannot tell, more are asked, up to all that prove; where all
cannot tell, the receipt says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bertforge.data.loader import Examples, spread
from bertforge.engines.base import BatchShape, Engine, Rows
from bertforge.engines.receipt import describe
from bertforge.engines.run import batch_of, padding_waste, run
from bertforge.errors import ArtifactError
from bertforge.evaluation.agreement import Agreement
from bertforge.evaluation.groups import wilson_interval
from bertforge.evaluation.logits import predict_logits
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.proof import structure
from bertforge.proof.golden import GoldenRows
from bertforge.proof.margin import Margin
from bertforge.proof.simulation import BESIDE, layers_of, rounded, row_shifts, sixteen_bits
from bertforge.proof.tolerances import (
    ACCURACY_LOSS,
    ACCURACY_Z,
    CHANGED_LABELS,
    FIRST_ROWS,
    SHIFT_FLOOR,
    SHIFT_RATIO,
    SHIFT_Z,
    STRUCTURE,
    WORST_FLOOR,
    WORST_RATIO,
)
from bertforge.scales import Scales

PROOF = (
    *("structure", "products", "golden_agreement", "golden_shift", "crowd_shift", "padding_waste", "told"),
    *("validation_agreement", "validation_shift", "validation_accuracy", "validation_accuracy_model"),
    *("accuracy_loss", "margin", "not_verified"),
)
"""What a receipt says of the last proof, and no longer once there is another."""


class PrecisionError(ArtifactError):
    """An engine is built as it should be and costs too much: a part of it in a wider type may cost less."""


@dataclass(frozen=True)
class Reference:
    """The model that an engine is held against, and what the engine's precision does to it."""

    model: BertForSequenceClassification
    """Plain, in float32."""
    golden: GoldenRows
    precision: str
    rest: str
    """What the engine computes in where it has no 8 bits: fp32, fp16 or bf16."""
    layers: tuple[str, ...] = ()
    """Linear layers that it has in 8 bits."""
    scales: Scales | None = None
    """Their ranges, where they stand in its graph."""
    stores: str = "fp32"
    """The type of its other weights in its files."""
    known: dict[int, np.ndarray] = field(default_factory=dict)
    """The model's own logits of the first rows that prove, by their number, once some engine was held against them."""

    def logits(self, examples: Examples, rows: np.ndarray) -> np.ndarray:
        """The model's own, `[rows, labels]`."""
        return predict_logits(self.model, examples, rows, "fp32")

    def stored(self, examples: Examples, rows: np.ndarray) -> np.ndarray:
        """With the weights that the engine stores, activations clamped to its ranges, nothing else rounded."""
        others = [name for name in (*layers_of(self.model), *BESIDE) if name not in self.layers]
        with (
            rounded(self.model, self.precision, self.layers, self.scales, activations=False),
            rounded(self.model, self.stores, others, activations=False),
        ):
            return self.logits(examples, rows)

    def simulated(self, examples: Examples, rows: np.ndarray) -> np.ndarray:
        """In the engine's precision, with ranges that are right for these rows, whatever its own are."""
        with rounded(self.model, self.precision, self.layers), sixteen_bits(self.model, self.rest, self.layers):
            return self.logits(examples, rows)


@dataclass(frozen=True)
class Shift:
    """By how much probabilities moved, with the interval of the mean of what passes the allowance."""

    rows: int
    found: float
    """The mean over the rows, as are the others."""
    simulated: float
    low: float
    """Of `found` less what is allowed."""
    high: float
    worst: float
    """Of a row."""
    worst_simulated: float

    @classmethod
    def of(cls, found: np.ndarray, simulated: np.ndarray) -> Shift:
        """From each row's shift, `[rows]`."""
        beyond = found - SHIFT_RATIO * simulated - SHIFT_FLOOR
        error = SHIFT_Z * float(beyond.std()) / math.sqrt(len(beyond))
        mean, worst = float(beyond.mean()), (float(found.max()), float(simulated.max()))
        return cls(len(found), float(found.mean()), float(simulated.mean()), mean - error, mean + error, *worst)

    @property
    def decided(self) -> bool:
        """Whether the rows tell."""
        return self.high <= 0 or not self.holds

    @property
    def holds(self) -> bool:
        """Neither the mean nor a row is shown to be beyond what is allowed."""
        return self.low <= 0 and self.worst <= WORST_RATIO * self.worst_simulated + WORST_FLOOR  # not for NaN

    def __str__(self) -> str:
        return (
            f"probabilities of {self.rows:,} rows move by {self.found:.4f} on average and {self.worst:.4f} at most, "
            f"where the precision moves them by {self.simulated:.4f} and {self.worst_simulated:.4f} in simulation"
        )


@dataclass(frozen=True)
class Loss:
    """Accuracy that an engine costs, a fraction, with its 95% interval; below 0 where it gains.

    The interval is that of Agresti and Min (2005, "Simple improved confidence intervals for comparing matched
    proportions"): half a row is added to each of the four cells, so that rows which all agree still leave a doubt.
    """

    rows: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, model_right: np.ndarray, engine_right: np.ndarray) -> Loss:
        """From whether each row is labelled rightly, `[rows]` bool."""
        rows = len(model_right)
        lost, won = int((model_right & ~engine_right).sum()), int((engine_right & ~model_right).sum())
        center = (lost - won) / (rows + 2)
        error = ACCURACY_Z * math.sqrt(lost + won + 1 - (lost - won) ** 2 / (rows + 2)) / (rows + 2)
        return cls(rows, (lost - won) / rows, center - error, center + error)

    @property
    def decided(self) -> bool:
        """Whether the rows tell that more, or that no more than is allowed was lost."""
        return self.low > ACCURACY_LOSS or self.high <= ACCURACY_LOSS

    @property
    def holds(self) -> bool:
        """No more than is allowed is shown to be lost."""
        return self.low <= ACCURACY_LOSS

    def __str__(self) -> str:
        told = "" if self.decided else f"; they cannot tell whether more than {100 * ACCURACY_LOSS:.1f} points are lost"
        interval = f"{-100 * self.high:+.2f} to {-100 * self.low:+.2f}"
        return f"{self.rows:,} validation rows: {0.0 - 100 * self.value:+.2f} points ({interval}){told}"


def prove(
    reference: Reference,
    engine: Engine,
    exact: Engine | None,
    rows: Rows | None,
    say: Callable[[str], object],
    until: float = math.inf,
) -> dict[str, Any]:
    """What the receipt says of the proof. `exact` is the engine with nothing rounded, where that can be.

    After `until`, by the monotonic clock, no more rows are asked, whatever those that were can tell. Raises
    ArtifactError for an engine that is not its model, PrecisionError for one whose precision costs too much.
    """
    name, golden = f"the {engine.name} engine in {engine.precision}", reference.golden
    proof: dict[str, Any] = {"products": _products(engine, golden), "structure": None}
    if exact:
        asked = structure.probes(golden, reference.model.config)
        found = structure.compare(exact, asked, reference.stored(asked, np.arange(len(asked.labels))))
        if not found.holds:
            raise ArtifactError(
                f"{name} does not compute what the model does: with nothing rounded, a logit of {found.probes} probes "
                f"differs by {found.largest_difference:.2g} of their spread, more than {STRUCTURE:g}"
            )
        proof["structure"] = found.to_dict()
    every = np.arange(len(golden.logits))
    crowd = spread(every, structure.CROWD)
    plain, simulated = reference.logits(golden.examples, every), reference.simulated(golden.examples, every)
    allowed = row_shifts(plain, simulated)
    alone = run(engine, golden.examples, every, shape=BatchShape(tokens=1))
    together = structure.crowded(engine, golden.examples, crowd)
    _check_finite(name, np.concatenate([alone, together]), "golden rows")
    beside = alone.copy()
    beside[crowd] = together  # one array, so that both are measured by one spread
    for logits, among, where in ((alone, every, ""), (beside, crowd, ", padded to the largest length,")):
        moved = Shift.of(row_shifts(plain, logits)[among], allowed[among])
        if not moved.holds:
            raise PrecisionError(f"{name}{where}: {moved}")
        proof["golden_shift" if among is every else "crowd_shift"] = asdict(moved)
    proof["golden_agreement"] = Agreement.of(plain, alone).to_dict()
    return proof if rows is None else proof | _prove_on(rows, reference, engine, name, say, until)


def _prove_on(
    rows: Rows, reference: Reference, engine: Engine, name: str, say: Callable[[str], object], until: float
) -> dict[str, Any]:
    """The proof's part on validation rows, as many as it takes; the shift is decided by the first of them, mostly."""
    plain, simulated, found = (np.zeros((0, len(reference.model.config.labels)), np.float32) for _ in range(3))
    moved, asked = None, min(FIRST_ROWS, len(rows))
    while True:
        part = rows.rows[len(found) : asked]
        found = np.concatenate([found, run(engine, rows.examples, part)])
        _check_finite(name, found, "validation rows")
        if asked not in reference.known:
            reference.known[asked] = np.concatenate([plain, reference.logits(rows.examples, part)])
        plain = reference.known[asked]
        if moved is None or not moved.decided:
            simulated = np.concatenate([simulated, reference.simulated(rows.examples, part)])
            moved = Shift.of(row_shifts(plain, found), row_shifts(plain, simulated))
        labels = rows.labels[:asked]
        loss = Loss.of(plain.argmax(1) == labels, found.argmax(1) == labels)
        if (loss.decided and moved.decided) or not moved.holds or asked == len(rows) or time.monotonic() > until:
            break
        more = min(4 * asked, len(rows))
        say(f"{asked:,} validation rows cannot tell whether accuracy is lost; asking {more:,}")
        asked = more
    if not moved.holds:
        raise PrecisionError(f"{name}: {moved}")
    agreement = Agreement.of(plain, found)
    if wilson_interval(agreement.changed_labels, asked)[0] > CHANGED_LABELS:
        raise PrecisionError(f"{name} changes the labels of {agreement.changed_labels:,} of {asked:,} validation rows")
    if not loss.holds:
        raise PrecisionError(f"{name} loses accuracy on {loss}")
    lengths = rows.examples.lengths(rows.rows[:asked])
    return {
        "padding_waste": padding_waste(lengths, engine.packed, engine.shape),
        "validation_agreement": agreement.to_dict(),
        "validation_shift": asdict(moved),
        "validation_accuracy": float((found.argmax(1) == labels).mean()),
        "validation_accuracy_model": float((plain.argmax(1) == labels).mean()),
        "accuracy_loss": asdict(loss),
        "margin": asdict(Margin.of(plain, found)),
        "told": str(loss),
    }


def _check_finite(name: str, logits: np.ndarray, of: str) -> None:
    if broken := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise ArtifactError(f"{name} gives no finite logits for {broken:,} of {len(logits):,} {of}")


def _products(engine: Engine, golden: GoldenRows) -> dict[str, Any] | None:
    """The receipt's part on matrix products, of the golden row of median length; None where the engine tells none."""
    lengths = golden.examples.lengths(np.arange(len(golden.logits)))
    middle = np.argsort(lengths, kind="stable")[[len(lengths) // 2]]
    products = engine.products(batch_of(golden.examples, middle, engine.packed, BatchShape(tokens=1)))
    return describe(products, engine.precision, int(lengths[middle[0]])) if products else None
