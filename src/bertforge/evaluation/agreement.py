"""Do two engines compute the same function? Logits of the same rows, side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bertforge.errors import DataError


@dataclass(frozen=True)
class Agreement:
    """How far `found` logits are from `reference` ones."""

    rows: int
    max_logit_difference: float
    mean_logit_difference: float
    changed_labels: int

    @classmethod
    def of(cls, reference: np.ndarray, found: np.ndarray) -> Agreement:
        """Of logits `[rows, labels]` in the same order; raises DataError when shapes differ."""
        if reference.shape != found.shape:
            raise DataError(f"logits of shapes {reference.shape} and {found.shape} cannot be compared")
        difference = np.abs(found - reference)
        return cls(
            rows=len(reference),
            max_logit_difference=float(difference.max()),  # NaN when a logit is
            mean_logit_difference=float(difference.mean()),
            changed_labels=int((found.argmax(1) != reference.argmax(1)).sum()),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.max_logit_difference:.2g}, "
            f"{self.changed_labels} of {self.rows:,} labels changed"
        )
