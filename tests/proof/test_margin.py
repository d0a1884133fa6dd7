"""The margin holds every label that changed, and leaves no more changed than it may on rows it never saw."""

import numpy as np
import pytest

from bertforge.proof.margin import Margin, drops, gaps

MAY_BE_LEFT = 1e-3  # what the cascade promises


def logits(rng, rows, noise=0.1, labels=2):
    """Of a model, and of an engine that moves each: by the sum of many roundings."""
    plain = rng.normal(0, 1.5, (rows, labels))
    return plain, plain + rng.normal(0, noise, plain.shape)


def changed(plain, found):
    return plain.argmax(1) != found.argmax(1)


@pytest.mark.parametrize("labels", [2, 3, 20])
def test_a_label_changes_where_the_drop_is_larger_than_the_gap(labels):
    plain, found = logits(np.random.default_rng(0), 5000, 0.5, labels)
    assert np.array_equal(drops(plain, found) > gaps(found), changed(plain, found))
    assert 100 < changed(plain, found).sum() < 4000
    ordered = np.sort(found, axis=1)
    assert np.array_equal(gaps(found), ordered[:, -1] - ordered[:, -2])


@pytest.mark.parametrize(("rows", "labels"), [(300, 2), (1000, 2), (4000, 2), (1000, 20)])
def test_of_rows_never_seen_no_more_labels_stay_changed_than_may(rows, labels):
    rng = np.random.default_rng(0)
    plain, found = logits(rng, 200_000, labels=labels)
    gap, wrong = gaps(found), changed(plain, found)
    assert wrong.mean() > 20 * MAY_BE_LEFT
    margins = [Margin.of(*logits(rng, rows, labels=labels)) for _ in range(20)]
    left = np.array([(wrong & (gap > margin.value)).mean() for margin in margins])
    assert (left < MAY_BE_LEFT).sum() >= 18
    assert left.max() < 2 * MAY_BE_LEFT
    assert np.mean([margin.asked for margin in margins]) < 0.65, "and not by asking everything again"
    half = np.array([(wrong & (gap > margin.value / 2)).mean() for margin in margins])
    assert half.mean() > 2 * MAY_BE_LEFT, "a margin half as wide would not do"


def test_rows_far_from_another_label_do_not_widen_it():
    plain, found = logits(np.random.default_rng(0), 1000)
    margin, far = Margin.of(plain, found), gaps(found) > 3
    plain[far] -= np.sign(found[far] - found[far].mean(axis=1, keepdims=True))  # so the engine widens them by 2
    assert drops(plain, found)[far].min() > margin.value
    assert not (changed(plain, found) & far).any()
    assert Margin.of(plain, found) == margin


def test_every_label_that_changed_is_within():
    plain, found = logits(np.random.default_rng(0), 1000)
    assert Margin.of(plain, found).asked < 0.5
    far = int(np.argmax(gaps(found)))
    plain[far] = plain[far, ::-1]  # which no spread of the drops foresees
    margin = Margin.of(plain, found)
    assert margin.value == gaps(found).max()
    assert margin.asked == 1
    assert margin.changed == changed(plain, found).sum() > 1


def test_what_it_says_of_its_own_rows_is_so():
    plain, found = logits(np.random.default_rng(1), 1000)
    margin = Margin.of(plain, found)
    assert margin.asked == (gaps(found) <= margin.value).mean()
    assert not (changed(plain, found) & (gaps(found) > margin.value)).any()
    assert MAY_BE_LEFT < margin.left_high < 0.005, "1,000 rows cannot show it by counting"
    assert margin == Margin.of(plain, found), "no chance in it"


def test_an_engine_that_is_its_model_asks_nothing_again():
    plain, _ = logits(np.random.default_rng(0), 100)
    margin = Margin.of(plain, plain.copy())
    assert (margin.value, margin.asked, margin.changed) == (0.0, 0.0, 0)
