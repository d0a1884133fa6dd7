"""The ROC curve and the reliability bins agree with scikit-learn and with the numbers they illustrate."""

import numpy as np
import pytest
from sklearn import metrics as sk

from bertforge.evaluation.curves import reliability, roc_curves
from bertforge.evaluation.metrics import classification_metrics


def made_rows(labels, decimals=1, rows=400):
    generator = np.random.default_rng(5)
    true = generator.integers(labels, size=rows)
    logits = generator.normal(size=(rows, labels))
    logits[np.arange(rows), true] += 0.8
    return logits.round(decimals), true


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_roc_points_are_scikit_learns(decimals):
    logits, true = made_rows(2, decimals)
    # Differences of decimals tie in exact arithmetic only: rank both by the same rounded margin.
    margin = (logits[:, 1] - logits[:, 0]).round(9)
    (curve,) = roc_curves(np.stack([np.zeros_like(margin), margin], axis=1), true, ["open", "closed"])
    fpr, tpr, thresholds = sk.roc_curve(true, margin, drop_intermediate=False)
    assert curve.label == "closed"
    np.testing.assert_allclose(curve.false_positive_rate, fpr, atol=1e-12)
    np.testing.assert_allclose(curve.true_positive_rate, tpr, atol=1e-12)
    np.testing.assert_allclose(curve.thresholds[1:], 1 / (1 + np.exp(-thresholds[1:])), atol=1e-12)


def test_area_under_the_points_is_the_auc():
    logits, true = made_rows(3)
    curves = roc_curves(logits, true, list("abc"))
    areas = [sk.auc(curve.false_positive_rate, curve.true_positive_rate) for curve in curves]
    expected = classification_metrics(logits, true, list("abc"), bootstrap=1).roc_auc.value
    assert np.mean(areas) == pytest.approx(expected, abs=1e-12)
    assert [curve.label for curve in curves] == ["a", "b", "c"]


def test_a_label_that_no_row_has_gets_no_curve():
    logits, true = made_rows(3)
    assert [c.label for c in roc_curves(logits, np.minimum(true, 1), list("abc"))] == ["a", "b"]
    assert roc_curves(logits[:, :2], np.zeros(400, dtype=int), list("ab")) == ()


def test_reliability_bins_add_up_to_the_calibration_error():
    logits, true = made_rows(4)
    bins = reliability(logits, true)
    assert sum(b.accuracy.rows for b in bins) == 400
    assert all(b.above < b.confidence <= b.up_to for b in bins)
    error = sum(b.accuracy.rows / 400 * abs(b.accuracy.accuracy - b.confidence) for b in bins)
    found = classification_metrics(logits, true, list("abcd"), bootstrap=1)
    assert error == pytest.approx(found.calibration_error.value, abs=1e-12)
