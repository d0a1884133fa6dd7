"""The bound is Clopper and Pearson's, for few rows and many."""

import numpy as np
import pytest

from bertforge.evaluation.binomial import CONFIDENCE, at_least, lower_bound

scipy_stats = pytest.importorskip("scipy.stats")


def test_the_tail_and_the_bound_are_scipys():
    generator = np.random.default_rng(0)
    rows = np.r_[1, 1, 2, 59, generator.integers(1, 50_000, 500)]
    right = np.r_[0, 1, 1, 59, (rows[4:] * generator.random(500) ** 0.3).astype(int)]
    share = np.clip(right / rows + generator.normal(0, 0.02, len(rows)), 1e-6, 1 - 1e-6)
    np.testing.assert_allclose(at_least(right, rows, share), scipy_stats.binom.sf(right - 1, rows, share), atol=1e-9)
    exact = np.where(right == 0, 0, scipy_stats.beta.ppf(1 - CONFIDENCE, np.maximum(right, 1), rows - right + 1))
    np.testing.assert_allclose(lower_bound(right, rows), exact, atol=1e-9)


def test_it_takes_59_right_rows_to_show_95_percent():
    assert lower_bound(np.array([58]), np.array([58]))[0] < 0.95 < lower_bound(np.array([59]), np.array([59]))[0]
