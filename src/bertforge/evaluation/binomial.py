"""How sure a share of rows is: the one-sided bound of Clopper and Pearson (1934), exact for any number of rows.

Of n rows, k are right. The lower bound at 95% is the share p at which k or more right ones would come up in just 5% of
all samples of n rows: P(at least k of n | p) = I_p(k, n - k + 1), the regularised incomplete beta function, which is
computed by its continued fraction (Numerical Recipes, third edition, section 6.4). Wilson's interval, which `groups`
draws, is a good picture of a share in the middle, but as a promise at 95 or 99% it is too bold: from 51 rows that are
all right it promises 95%, where the exact bound needs 59.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
_STEPS = 200  # of the fraction; it takes some sqrt(rows), and ends sooner
_HALVINGS = 50
_TINY = 1e-300

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def at_least(right: Ints, rows: Ints, share: Floats | float) -> Floats:
    """P(`right` or more of `rows` | `share`), `[n]`, for 0 <= right <= rows and 0 < share < 1."""
    right, rows = np.asarray(right), np.asarray(rows)
    x = np.broadcast_to(np.asarray(share, np.float64), right.shape)
    a, b = np.maximum(right, 1).astype(np.float64), (rows - right + 1).astype(np.float64)
    turned = x > (a + 1) / (a + b + 2)  # where the fraction of the other tail converges faster
    found = _fraction(np.where(turned, b, a), np.where(turned, a, b), np.where(turned, 1 - x, x))
    return np.where(right == 0, 1.0, np.where(turned, 1 - found, found))


def lower_bound(right: Ints, rows: Ints, confidence: float = CONFIDENCE) -> Floats:
    """The share, `[n]`, that the true one is above with this confidence when `right` of `rows` >= 1 are right."""
    right, rows = np.asarray(right), np.asarray(rows)
    low, high = np.zeros(right.shape), np.ones(right.shape)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = at_least(right, rows, middle) <= 1 - confidence
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(right == 0, 0.0, low)


def _fraction(a: Floats, b: Floats, x: Floats) -> Floats:
    """I_x(a, b) by Lentz's method."""
    log_beta = np.array(
        [math.lgamma(p) + math.lgamma(q) - math.lgamma(p + q) for p, q in zip(a.flat, b.flat, strict=True)]
    )
    front = np.exp(a * np.log(x) + b * np.log1p(-x) - log_beta.reshape(a.shape)) / a
    c = np.ones_like(a)
    d = 1 / _away(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _STEPS):
        before = value
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + term * d)
            c = _away(1 + term / c)
            value = value * c * d
        if np.allclose(value, before, rtol=1e-13, atol=0):
            break
    result: Floats = front * value
    return result


def _away(value: Floats) -> Floats:
    return np.where(np.abs(value) < _TINY, _TINY, value)
