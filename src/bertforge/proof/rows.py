"""Which rows do what: those that calibrate, those that tune and those that prove are three disjoint sets.

Train rows calibrate. What is chosen by its result, such as a method or the layers to spare, is chosen on a fourth of
the validation rows, a thousand at most. The others judge what came of it. Test rows do neither.
"""

from __future__ import annotations

import numpy as np

from bertforge.data.loader import spread
from bertforge.errors import DataError

CALIBRATION_ROWS = 300
_TUNING_SHARE, _TUNING_ROWS = 4, 1000  # one validation row in so many, and so many at most
RANKING_ROWS = 250  # of the rows that tune, where they are asked many times


def calibrating(train: np.ndarray, most: int = CALIBRATION_ROWS) -> np.ndarray:
    """Rows spread over the train rows."""
    return spread(train, most)


def tuning(validation: np.ndarray) -> np.ndarray:
    """Rows spread over the validation rows."""
    return spread(validation, min(_TUNING_ROWS, max(1, len(validation) // _TUNING_SHARE)))


def proving(validation: np.ndarray) -> np.ndarray:
    """All other validation rows, in an order of which every beginning is a fair sample."""
    others = np.setdiff1d(validation, tuning(validation))
    return np.random.default_rng(0).permutation(others)


def check_classes(labels: np.ndarray) -> None:
    """Raises DataError when the rows that calibrate are all of one class."""
    if len(np.unique(labels)) < 2:
        raise DataError("the calibration rows hold one class only; prepare a table with rows of every class")
