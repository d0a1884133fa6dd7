"""How long and how fast to train: what a recipe leaves open, derived from the rows, their lengths and the labels.

Settings tuned on one table do not fit the next: a step of 4,096 tokens is 22 long questions or 300 short messages, so a
small table of short texts got a few dozen steps and learnt nothing. A step is therefore counted in rows, and a run in
steps: `STEPS`, and `STEPS_PER_CLASS` for each class, since every class has to be met some dozen times. A table of a
thousand rows gets there in several epochs; a large one is past it in the first, and still gets `_LEAST_EPOCHS`, for the
rows seen a second and third time go on teaching.

The learning rates suit all-MiniLM-L6-v2, and fall with the width of a larger model, as published ones for BERT-base and
BERT-large do (Devlin et al. 2018, appendix A.3). Nothing here was fitted to one table: eight tables of 800 to 20,000
rows were tried on their validation rows, and docs/engineering-log.md has the figures.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

from bertforge.data.loader import Split
from bertforge.model.config import BertConfig
from bertforge.training.config import Recipe

STEPS, STEPS_PER_CLASS = 200, 30
MOST_EPOCHS = 15
_LEAST_EPOCHS = {100_000: 3, 1_000_000: 2}  # up to so many train rows; 1 beyond
_ROWS_PER_STEP = {125: 8, 500: 16}  # up to so many train rows; 32 beyond
_WIDTH = 384  # of all-MiniLM-L6-v2, whose learning rates these are:
_LR, _LORA_LR, _COLUMNS_LR = 1e-4, 2e-3, 1e-3
_WARMUP = 0.1


@dataclass(frozen=True)
class Schedule:
    """The settings of `Recipe` of the same names, with nothing left open."""

    rows_per_step: int | None
    """None where tokens alone limit a step."""
    tokens_per_step: int
    epochs: int
    lr: float
    head_lr: float
    warmup: float

    @classmethod
    def of(cls, recipe: Recipe, split: Split, config: BertConfig) -> Self:
        """What `recipe` says, and for the rest what suits the train rows and a model of `config`."""
        rows, classes = len(split.train), len(config.labels)
        rows_per_step, tokens_per_step = recipe.rows_per_step, recipe.tokens_per_step
        if tokens_per_step is None:
            rows_per_step = rows_per_step or _up_to(_ROWS_PER_STEP, rows, 32)
            tokens_per_step = rows_per_step * recipe.max_length  # so many of the longest texts: rows alone limit a step
        a_step = tokens_per_step / max(1.0, float(split.examples.lengths(split.train).mean()))  # rows
        steps_an_epoch = math.ceil(rows / min(a_step, rows_per_step or a_step))
        wanted = math.ceil((STEPS + STEPS_PER_CLASS * classes) / steps_an_epoch)
        scale = _WIDTH / config.hidden_size
        lr = recipe.lr or float(f"{(_LORA_LR if recipe.lora else _LR) * scale:.1e}")
        return cls(
            rows_per_step=rows_per_step,
            tokens_per_step=tokens_per_step,
            epochs=recipe.epochs or min(MOST_EPOCHS, max(_up_to(_LEAST_EPOCHS, rows, 1), wanted)),
            lr=lr,
            head_lr=recipe.head_lr or (max(lr, _COLUMNS_LR) if recipe.tabular else lr),
            warmup=_WARMUP if recipe.warmup is None else recipe.warmup,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def describe(self, rows: int, tokens: float, steps: int) -> str:
        """One line for `rows` of `tokens` on average, and `steps` in all."""
        a_step = f"{self.rows_per_step} rows" if self.rows_per_step else f"up to {self.tokens_per_step:,} tokens"
        head = f" (head {self.head_lr:g})" if self.head_lr != self.lr else ""
        epochs = f"{self.epochs} epochs" if self.epochs > 1 else "1 epoch"
        return (
            f"{rows:,} rows of {tokens:.0f} tokens: {a_step} a step, {epochs}, {steps:,} steps, "
            f"learning rate {self.lr:g}{head}; --set to change"
        )


def _up_to(table: dict[int, int], rows: int, beyond: int) -> int:
    """The value of the first limit that `rows` do not pass."""
    return next((value for limit, value in table.items() if rows <= limit), beyond)
