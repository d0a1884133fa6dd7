"""Rows that calibrate, tune and prove are three disjoint sets, whatever there is of them."""

import numpy as np
import pytest

from bertforge.errors import DataError
from bertforge.proof.rows import calibrating, check_classes, proving, tuning


@pytest.mark.parametrize("count", [2, 5, 17, 400, 5000])
def test_rows_that_tune_prove_nothing(count):
    validation = np.arange(1000, 1000 + count)
    tuned, proved = set(tuning(validation).tolist()), set(proving(validation).tolist())
    assert not tuned & proved
    assert tuned | proved == set(validation.tolist())
    assert len(proved) >= count / 2
    assert 1 <= len(tuned) <= 1000


def test_the_first_rows_that_prove_are_a_sample_of_all():
    validation = np.arange(4000)
    first = proving(validation)[:250]
    assert np.array_equal(first, proving(validation)[:250]), "the same each time"
    assert 1500 < first.mean() < 2500
    assert not np.array_equal(first, np.sort(first))


def test_calibrating_rows_are_spread_over_the_train_rows():
    found = calibrating(np.arange(3000))
    assert len(found) == 300
    assert found.min() < 100
    assert found.max() > 2900


def test_one_class_calibrates_nothing():
    check_classes(np.array([0, 0, 1]))
    with pytest.raises(DataError, match="one class only"):
        check_classes(np.zeros(3, np.int64))
