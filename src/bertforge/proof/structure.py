"""Is every part of the model in the engine? Probes that depend on each part, run where rounding cannot blur them.

A head that is lost, a weak mask or a position too far moves the logits of a small model less than 8 bits do: no rule
on an engine's own logits tells one from the other. So the engine's files are opened once more in a way in which nothing
is rounded on the way (`Target.exact`): the weights as they are stored, arithmetic in float32, activations clamped and
scaled but not rounded. What is left must be the model with its weights rounded and its activations clamped in the same
way, up to the order of summation.

The probes are golden rows as they are, cut to a single token, in another order, drawn out to the largest length, filled
with random tokens, with no values in their columns and with every name there is, and some of them among neighbours with
padding up to the largest length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bertforge.columns.registry import KINDS
from bertforge.data.loader import Examples, spread
from bertforge.data.tokens import TokenStore
from bertforge.engines.base import BatchShape, Engine
from bertforge.engines.run import batch_of, run
from bertforge.model.config import BertConfig
from bertforge.proof.golden import GoldenRows
from bertforge.proof.tolerances import STRUCTURE

CROWD = 8  # rows that are padded to the largest length: more of them take long and show no more
_RANDOM_ROWS = 8
_MOST_NAMES = 500  # of a column; more of them take long


@dataclass(frozen=True)
class Structure:
    """What the probes showed."""

    probes: int
    largest_difference: float
    """Of a logit, as a share of `spread`; NaN when a logit was none."""
    spread: float
    """Standard deviation of the model's logits over the probes."""

    @property
    def holds(self) -> bool:
        """Whether it is the model's."""
        return self.largest_difference <= STRUCTURE  # not for NaN

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "limit": STRUCTURE}


def probes(golden: GoldenRows, config: BertConfig) -> Examples:
    """Rows made from golden ones, with the columns of the row each was made from; and short ones that together have
    every name that the columns know."""
    given, random = golden.examples, np.random.default_rng(0)
    texts = [_tokens(given, row) for row in range(len(golden.logits))]
    made: list[tuple[np.ndarray, int]] = [(text, row) for row, text in enumerate(texts)]
    longest = max(len(text) for text in texts)
    for row, text in enumerate(texts):
        first, inner, last = text[:1], text[1:-1], text[-1:]
        made.append((np.concatenate([first, inner[::-1], last]), row))
        if row % 4 == 0:
            made.append((np.concatenate([first, inner[:1], last]), row))  # one token, if it has any
            made.append((text[:1], row))  # a sequence of length 1
            room = given.max_length - 2
            made.append((np.concatenate([first, np.resize(inner if len(inner) else first, room), last]), row))
    for row, length in enumerate(np.linspace(4, longest, _RANDOM_ROWS).astype(int)):
        inner = random.integers(0, config.vocab_size, max(1, length - 2))
        first, last = texts[0][:1], texts[0][-1:]
        made.append((np.concatenate([first, inner, last]), row % len(texts)))
    kinds = config.tabular.kinds if config.tabular else {}
    names = {name: KINDS[name].every_name(shape)[:_MOST_NAMES] for name, shape in kinds.items()}
    short = np.concatenate([texts[0][:2], texts[0][-1:]])
    made += [(short, 0)] * max(map(len, names.values()), default=0)
    ids = np.concatenate([text for text, _ in made])
    offsets = np.concatenate([[0], np.cumsum([len(text) for text, _ in made])])
    rows = np.array([row for _, row in made])
    return Examples(
        tokens=TokenStore(ids, offsets),
        labels=np.full(len(made), -1),
        sep_id=given.sep_id,
        max_length=given.max_length,
        tabular=None
        if given.tabular is None
        else {name: _columns(array, rows, names[name]) for name, array in given.tabular.items()},
    )


def crowded(engine: Engine, examples: Examples, rows: np.ndarray) -> np.ndarray:
    """Logits `[rows, labels]` of a few rows that stand together, all padded to the largest length."""
    width = examples.max_length
    shape = BatchShape(tokens=width * len(rows), edges=(width,))
    return engine.logits(batch_of(examples, rows, engine.packed, shape))


def compare(exact: Engine, examples: Examples, wanted: np.ndarray) -> Structure:
    """The logits of `exact` beside those `wanted`, `[rows, labels]`, of every row of `examples`, alone and crowded."""
    rows = np.arange(len(wanted))
    some = spread(rows, CROWD)
    alone = run(exact, examples, rows, shape=BatchShape(tokens=1))
    together = crowded(exact, examples, some)
    off = np.abs(np.concatenate([alone, together]) - np.concatenate([wanted, wanted[some]]))
    deviation = float((wanted - wanted.mean(0)).std())
    return Structure(len(rows), float(off.max()) / max(deviation, 1e-6), deviation)  # NaN where a logit is


def _columns(array: np.ndarray, rows: np.ndarray, names: np.ndarray) -> np.ndarray:
    """A kind's values of `rows`, the last of them `names`; in every fifth row they are missing: no number, no name."""
    found: np.ndarray = array[rows]
    found[::5] = np.nan if array.dtype.kind == "f" else 0
    if len(names):
        found[-len(names) :] = 0
        found[-len(names) :, : names.shape[1]] = names
    return found


def _tokens(examples: Examples, row: int) -> np.ndarray:
    """Of a row, cut as the model cuts it."""
    batch, _ = examples.pack(np.array([row]))
    return batch.input_ids.numpy()
