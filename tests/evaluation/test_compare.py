"""The paired test: exact p, signs, and that it sees what an unpaired look would miss."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from bertforge.errors import DataError
from bertforge.evaluation.compare import compare, mcnemar_p


def exact_p(first: int, second: int) -> float:
    """The definition, in fractions."""
    rows = first + second
    tail = sum(Fraction(math.comb(rows, k), 2**rows) for k in range(min(first, second) + 1))
    return float(min(Fraction(1), 2 * tail))


def logits_of(predicted, margin=1.0):
    return np.stack([np.zeros(len(predicted)), np.where(predicted == 1, margin, -margin)], axis=1)


@pytest.mark.parametrize(
    ("first", "second"),
    [(0, 0), (0, 1), (1, 1), (0, 6), (3, 9), (10, 11), (5, 60), (400, 480), (1500, 1501), (0, 2000)],
)
def test_p_value_is_the_exact_binomial_one(first, second):
    assert mcnemar_p(first, second) == pytest.approx(exact_p(first, second), rel=1e-12, abs=0)
    assert mcnemar_p(second, first) == mcnemar_p(first, second)


def test_p_value_of_many_discordant_rows_is_finite_and_near_the_normal_approximation():
    z = (10_300 - 9_700 - 1) / math.sqrt(20_000)  # with continuity correction
    assert mcnemar_p(9_700, 10_300) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar_p(0, 100_000) == 0.0


def test_a_run_against_itself_differs_in_nothing():
    logits = np.random.default_rng(0).normal(size=(200, 3))
    labels = np.random.default_rng(1).integers(3, size=200)
    found = compare(logits, logits, labels, names=("a", "b"), bootstrap=20)
    assert (found.changed_labels, found.p_value, found.accuracy_difference.value) == (0, 1.0, 0.0)
    assert found.verdict == "b and a give the same label to all 200 rows"


def test_counts_signs_and_verdict():
    labels = np.array([1] * 100)
    first = np.array([1] * 60 + [0] * 40)
    second = np.array([0] * 10 + [1] * 90)
    found = compare(logits_of(first), logits_of(second, 2.0), labels, names=("base", "lora"), bootstrap=200)
    assert (found.only_first_correct, found.only_second_correct, found.changed_labels) == (10, 40, 50)
    assert found.accuracy_difference.value == pytest.approx(0.3)
    assert 0.1 < found.accuracy_difference.low < 0.3 < found.accuracy_difference.high < 0.5
    assert found.loss_difference.value == pytest.approx(
        0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2))
        - 0.6 * math.log1p(math.exp(-1)) - 0.4 * math.log1p(math.exp(1))
    )  # fmt: skip
    assert found.p_value == pytest.approx(exact_p(10, 40))
    low, high = (f"{100 * bound:+.2f}" for bound in (found.accuracy_difference.low, found.accuracy_difference.high))
    told = f"{low} to {high}, p = 2.4e-05, 50 of 100 labels differ"
    assert found.verdict == f"lora is more accurate than base: +30.00 points ({told})"
    back = compare(logits_of(second), logits_of(first), labels, names=("lora", "base"), bootstrap=20)
    assert "base is less accurate than lora: -30.00 points" in back.verdict
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["verdict"] == found.verdict


def test_a_small_difference_is_not_called_one():
    labels = np.ones(100, dtype=int)
    first, second = np.array([1] * 80 + [0] * 20), np.array([1] * 83 + [0] * 17)
    verdict = compare(logits_of(first), logits_of(second), labels, bootstrap=20).verdict
    assert verdict.startswith("no difference shown between second and first: +3.00 points (+")
    assert ", p = 0.25, 3 of 100 labels differ)" in verdict


def test_pairing_narrows_the_interval():
    """Two runs that err on the same rows: their difference is known better than either accuracy."""
    labels = np.ones(1000, dtype=int)
    first = np.array([1] * 700 + [0] * 300)
    paired = compare(logits_of(first), logits_of(np.array([1] * 720 + [0] * 280)), labels).accuracy_difference
    crossed = compare(logits_of(first), logits_of(np.array([0] * 280 + [1] * 720)), labels).accuracy_difference
    assert paired.value == pytest.approx(crossed.value)
    assert paired.high - paired.low < (crossed.high - crossed.low) / 4
    assert paired.low > 0 > crossed.low


def test_logits_of_another_task_are_refused():
    with pytest.raises(DataError, match="a has 2 labels and b has 3"):
        compare(np.zeros((4, 2)), np.zeros((4, 3)), np.zeros(4, dtype=int), names=("a", "b"))
    with pytest.raises(DataError, match="one per row"):
        compare(np.zeros((4, 2)), np.zeros((5, 2)), np.zeros(4, dtype=int))
