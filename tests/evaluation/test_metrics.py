"""Metrics agree with scikit-learn to 1e-12, with intervals that are reproducible; what rows do not define is said."""

import json
import math
import time
import tracemalloc

import numpy as np
import pytest
from sklearn import metrics as sk

from bertforge.errors import ArtifactError, DataError
from bertforge.evaluation.bootstrap import Estimate, mirrored, resample_weights
from bertforge.evaluation.metrics import (
    SCALARS,
    Metrics,
    Ranking,
    calibration_bins,
    calibration_error,
    classification_metrics,
    macro_f1,
)


def made_rows(rows: int, labels: int, seed: int = 0, decimals: int = 6):
    """Noisy logits float32 `[rows, labels]` and labels; few decimals make many ties."""
    generator = np.random.default_rng(seed)
    true = generator.integers(labels, size=rows)
    logits = generator.normal(size=(rows, labels))
    logits[np.arange(rows), true] += 1
    return logits.round(decimals).astype(np.float32), true


def probabilities(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def plain_calibration_error(logits, true):
    """Guo et al. 2017, equation 3, as a loop over bins."""
    p = probabilities(logits)
    confidence, correct, error = p.max(axis=1), p.argmax(axis=1) == true, 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def values(found: Metrics) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in found.scalars().items()}


@pytest.mark.parametrize("decimals", [6, 0], ids=["distinct", "many ties"])
def test_two_labels_agree_with_scikit_learn(decimals):
    logits, true = made_rows(700, 2, decimals=decimals)
    p, predicted = probabilities(logits), logits.argmax(axis=1)
    found = classification_metrics(logits, true, ["open", "closed"], bootstrap=10)
    margin = logits[:, 1].astype(np.float64) - logits[:, 0]
    expected = {
        "loss": sk.log_loss(true, p),
        "accuracy": sk.accuracy_score(true, predicted),
        "precision": sk.precision_score(true, predicted),
        "recall": sk.recall_score(true, predicted),
        "f1": sk.f1_score(true, predicted),
        "macro_f1": sk.f1_score(true, predicted, average="macro"),
        "roc_auc": sk.roc_auc_score(true, margin),
        "calibration_error": plain_calibration_error(logits, true),
    }
    assert values(found) == pytest.approx(expected, abs=1e-12, rel=0)
    cells = [[cell.value for cell in row] for row in found.confusion]
    assert cells == sk.confusion_matrix(true, predicted).tolist()
    assert calibration_error(logits, true).value == found.calibration_error.value
    assert macro_f1(true, predicted, 2) == found.macro_f1.value
    assert found.average == "label 'closed'"


def test_many_labels_agree_with_scikit_learn_macro_averages():
    logits, true = made_rows(600, 5)
    p, predicted = probabilities(logits), logits.argmax(axis=1)
    found = classification_metrics(logits, true, list("abcde"), bootstrap=10)
    expected = {
        "loss": sk.log_loss(true, p),
        "accuracy": sk.accuracy_score(true, predicted),
        "precision": sk.precision_score(true, predicted, average="macro"),
        "recall": sk.recall_score(true, predicted, average="macro"),
        "f1": sk.f1_score(true, predicted, average="macro"),
        "macro_f1": sk.f1_score(true, predicted, average="macro"),
        "roc_auc": sk.roc_auc_score(true, p, multi_class="ovr", average="macro"),
        "calibration_error": plain_calibration_error(logits, true),
    }
    assert values(found) == pytest.approx(expected, abs=1e-12, rel=0)
    assert found.average == "macro mean of 5 labels"


def test_macro_mean_is_over_the_labels_that_occur_and_counts_a_label_never_predicted_as_zero():
    logits = np.array([[2, 0, 0, 0], [2, 0, 0, 0], [0, 2, 0, 0]], dtype=np.float32)
    found = classification_metrics(logits, np.array([0, 2, 1]), list("abcd"), bootstrap=5)  # d never occurs
    predicted = [0, 0, 1]
    assert found.precision.value == pytest.approx(
        sk.precision_score([0, 2, 1], predicted, average="macro", zero_division=0)
    )
    assert found.roc_auc.value is None
    assert "'d'" in found.roc_auc.reason


def test_weighted_statistics_equal_those_of_repeated_rows():
    """The bootstrap's shortcut: a row of weight 3 counts as three rows."""
    logits, true = made_rows(200, 2, decimals=1)
    weights = next(resample_weights(200, 1, seed=3))
    margin = logits[:, 1].astype(np.float64) - logits[:, 0]
    repeated = np.repeat(np.arange(200), weights.astype(int))
    assert weights.sum() == 200
    assert Ranking(margin, true == 1).auc(weights) == pytest.approx(
        sk.roc_auc_score(true[repeated], margin[repeated]), abs=1e-12
    )


def test_bootstrap_equals_one_that_copies_rows():
    logits, true = made_rows(120, 2)
    found = classification_metrics(logits, true, ["a", "b"], bootstrap=40, seed=7)
    samples = []
    for weights in resample_weights(120, 40, 7):
        rows = np.repeat(np.arange(120), weights.astype(int))
        samples.append(values(classification_metrics(logits[rows], true[rows], ["a", "b"], bootstrap=1)))
    for name in set(SCALARS) - {"calibration_error"}:
        low, high = np.quantile([sample[name] for sample in samples], [0.025, 0.975])
        assert (getattr(found, name).low, getattr(found, name).high) == pytest.approx((low, high), abs=1e-12)


def test_same_seed_same_intervals_other_seed_others():
    logits, true = made_rows(300, 2)
    first, again, other = (
        classification_metrics(logits, true, ["a", "b"], bootstrap=50, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.accuracy != other.accuracy
    assert values(first) == values(other)


def test_intervals_hold_the_truth_about_95_times_in_100():
    """200 seeded draws of 250 rows whose true accuracy, recall, ... are known from 400,000 rows of the same source."""

    def draw(rows, seed):
        generator = np.random.default_rng(seed)
        z = 1.8 * generator.normal(size=rows)
        return np.stack([np.zeros(rows), 1.5 * z], axis=1), (generator.random(rows) < 1 / (1 + np.exp(-z))).astype(int)

    truth = values(classification_metrics(*draw(400_000, 0), ["a", "b"], bootstrap=1))
    inside = dict.fromkeys(SCALARS, 0)
    for seed in range(1, 201):
        found = classification_metrics(*draw(250, seed), ["a", "b"], bootstrap=200, seed=seed)
        for name, estimate in found.scalars().items():
            inside[name] += estimate.low <= truth[name] <= estimate.high
    for name, count in inside.items():
        lowest = 0.80 if name == "calibration_error" else 0.90  # biased upwards; see bootstrap.py
        assert lowest <= count / 200 <= 0.99, f"{name}: {count} of 200 intervals hold the true value"


def test_a_bin_holds_its_upper_edge_and_not_its_lower_one():
    edges = np.array([0.2, 0.2001, 0.4, 0.4001, 1.0])
    assert calibration_bins(edges).tolist() == [2, 3, 5, 6, 14]


def test_calibration_interval_is_mirrored_and_never_negative():
    assert mirrored(Estimate(0.02, 0.015, 0.05)) == Estimate(0.02, 0.0, 0.025)
    assert mirrored(Estimate(0.02, 0.05, 0.06)) == Estimate(0.02, 0.0, 0.02)


def test_ten_thousand_rows_take_at_most_a_few_seconds():
    logits, true = made_rows(10_000, 2)
    start = time.thread_time()  # of work: on a busy machine more time passes
    classification_metrics(logits, true, ["a", "b"])
    assert time.thread_time() - start < 3  # 0.25 s on one idle core


def test_with_many_labels_the_confusion_matrix_is_not_resampled():
    names = [str(i) for i in range(31)]
    logits, true = made_rows(200, 31)
    found = classification_metrics(logits, true, names, bootstrap=5)
    cells = [[cell.value for cell in row] for row in found.confusion]
    assert cells == sk.confusion_matrix(true, logits.argmax(axis=1), labels=range(31)).tolist()
    assert {cell.low for row in found.confusion for cell in row} == {None}
    assert found.confusion[0][0].reason == "no interval with more than 30 labels"
    assert found.accuracy.low is not None
    tracemalloc.start()
    classification_metrics(*made_rows(50, 400), [str(i) for i in range(400)], bootstrap=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 400 * 400 * 8, "less than the cells of every resample"


def test_json_round_trip():
    found = classification_metrics(*made_rows(50, 3), ["a", "b", "c"], bootstrap=20)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Metrics.from_dict(json.loads(text)) == found
    fields = found.to_dict()
    del fields["f1"]
    with pytest.raises(ArtifactError, match="f1"):
        Metrics.from_dict(fields)
    with pytest.raises(ArtifactError, match="not an estimate"):
        Metrics.from_dict(found.to_dict() | {"f1": 0.5})


def test_rows_of_one_class_have_no_auc_and_say_why():
    logits, _ = made_rows(40, 2)
    found = classification_metrics(logits, np.zeros(40, dtype=int), ["open", "closed"], bootstrap=20)
    assert found.roc_auc == Estimate(None, None, None, "no row has the label 'closed'")
    assert found.recall.value is None
    assert found.accuracy.value is not None
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_label_never_predicted_has_no_precision():
    logits = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    found = classification_metrics(logits, np.array([0, 1, 0]), ["open", "closed"], bootstrap=20)
    assert (found.precision.value, found.precision.reason) == (None, "no row is predicted as 'closed'")
    assert (found.recall.value, found.f1.value) == (0.0, 0.0)


def test_one_row_has_values_and_no_interval():
    found = classification_metrics(np.array([[0.0, 1.0]]), np.array([1]), ["a", "b"])
    assert found.accuracy == Estimate(1.0, None, None, "an interval needs two rows or more")
    assert found.loss.value == pytest.approx(math.log(1 + math.exp(-1)))


def test_probabilities_of_exactly_zero_and_one_have_finite_losses():
    logits = np.array([[1000.0, -1000.0], [-1000.0, 1000.0], [900.0, -900.0]], dtype=np.float32)
    found = classification_metrics(logits, np.array([0, 1, 1]), ["a", "b"], bootstrap=20)
    assert found.loss.value == pytest.approx(1800 / 3)
    assert found.roc_auc.value == 1.0  # -1800 ranks above -2000, though both probabilities are 0
    assert found.calibration_error.value == pytest.approx(1 / 3)


GOOD = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("logits", "labels", "names", "message"),
    [
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), [0, 1], "ab", "1 rows are NaN or infinite, first in row 1"),
        (np.array([[np.inf, 1.0], [0.0, 0.0]]), [0, 1], "ab", "first in row 0"),
        (GOOD, [0, 2], "ab", "row 1 has label 2, but the logits have labels 0 to 1"),
        (GOOD, [-1, 0], "ab", "row 0 has label -1"),
        (GOOD, [0.0, 1.0], "ab", "labels are float64"),
        (GOOD, [0, 1, 1], "ab", "labels have shape"),
        (GOOD, [0, 1], "abc", "3 label names"),
        (GOOD[:, :1], [0, 0], "a", "two labels or more"),
        (GOOD[:0], np.zeros(0, dtype=int), "ab", "no rows"),
    ],
)
def test_bad_input_is_refused_in_one_line(logits, labels, names, message):
    with pytest.raises(DataError, match=message) as raised:
        classification_metrics(logits, np.asarray(labels), list(names))
    assert "\n" not in str(raised.value)
