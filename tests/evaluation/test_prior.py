"""Bayes' rule at other shares of the labels, and rows that have them."""

import numpy as np
import pytest

from bertforge.errors import ArtifactError, UsageError
from bertforge.evaluation.prior import complete_shares, corrected, rows_with_shares, shifts, train_shares
from bertforge.evaluation.scores import log_softmax

LABELS = ("open", "closed", "odd")


def gaussians(shares, rows, seed):
    """Rows of three labels around different points, and what a perfect model says of each label's likelihood."""
    generator = np.random.default_rng(seed)
    true = generator.choice(3, rows, p=shares)
    points = np.array([[0.0, 0.0], [1.5, 0.0], [0.0, 1.5]])
    x = points[true] + generator.normal(size=(rows, 2))
    return true, -((x[:, None] - points) ** 2).sum(axis=2) / 2  # [rows, labels]


def test_a_perfect_model_stays_perfect_at_other_shares():
    """Its probabilities at the new shares are those of a model trained there; without the correction they are not."""
    trained, new = (0.5, 0.3, 0.2), (0.9, 0.06, 0.04)
    true, likelihood = gaussians(new, 20_000, 0)
    here, there = (np.exp(log_softmax(likelihood + np.log(shares))) for shares in (trained, new))
    found = corrected(here, trained, new)
    np.testing.assert_allclose(found, there, atol=1e-12)
    assert np.abs(found.mean(axis=0) - np.bincount(true) / len(true)).max() < 0.01
    assert np.abs(here.mean(axis=0) - np.bincount(true) / len(true)).max() > 0.1
    shifted = log_softmax(likelihood + np.log(trained) + shifts(trained, new))
    np.testing.assert_allclose(np.exp(shifted), there, atol=1e-12)


def test_labels_that_are_not_named_divide_what_is_left_as_in_training():
    assert complete_shares({"closed": 0.06}, ("open", "closed"), (0.5, 0.5)) == pytest.approx((0.94, 0.06))
    assert complete_shares({"closed": 0.1}, LABELS, (0.4, 0.4, 0.2)) == pytest.approx((0.6, 0.1, 0.3))
    whole = {"open": 0.5, "closed": 0.3, "odd": 0.2}
    assert complete_shares(whole, LABELS, (0.4, 0.4, 0.2)) == (0.5, 0.3, 0.2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shut": 0.1}, "prior names the label 'shut', but the model knows open, closed, odd"),
        ({"closed": 6}, "prior closed=6: a share lies between 0 and 1, such as closed=0.06"),
        ({"closed": float("nan")}, "a share lies between 0 and 1"),
        ({"closed": 0.6, "odd": 0.4}, "add up to 1, which leaves nothing for the labels not named"),
        ({"open": 0.5, "closed": 0.3, "odd": 0.1}, "names every label, and its shares add up to 0.9, not to 1"),
    ],
)
def test_shares_that_cannot_be_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        complete_shares(given, LABELS, (0.4, 0.4, 0.2))


def test_an_older_model_says_that_it_does_not_tell():
    assert train_shares({"label_shares": [0.5, 0.5]}) == (0.5, 0.5)
    with pytest.raises(ArtifactError, match="train it again, or leave the prior out"):
        train_shares({})


def test_rows_are_left_out_until_the_shares_are_right():
    labels = np.tile([0, 1, 1, 0, 0], 200)  # 600 and 400
    kept = rows_with_shares(labels, (0.94, 0.06))
    assert np.bincount(labels[kept]).tolist() == [600, 38]
    assert kept.tolist() == sorted(set(kept.tolist()))
    rare = kept[labels[kept] == 1]
    assert rare.min() < 50 < 950 < rare.max(), "from the whole table"
    assert np.bincount(labels[rows_with_shares(labels, (0.6, 0.4))]).tolist() == [600, 400]
    with pytest.raises(UsageError, match=r"1,000 rows are too few for shares of 0\.0001, 1"):
        rows_with_shares(labels, (0.0001, 0.9999))
