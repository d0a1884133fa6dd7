"""Columns as the trees read them: no row's own label in them, and nothing that could stop the fit."""

import numpy as np
import pandas as pd
import pytest

from bertforge.columns.transform import TabularSpec
from bertforge.evaluation.boosting import boosted_trees, encode_columns


def test_numbers_names_and_gaps():
    frame = pd.DataFrame({"n": ["1", "", "x", "1e999", "5"], "c": ["a", "b", "", "a", "new"]})
    spec = TabularSpec.of(numeric=("n",), categorical=("c",))
    encoded, categories = encode_columns(frame, spec, np.array([0, 1, 0, 1, 1]), np.arange(3), np.array([3, 4]))
    assert categories == ["c"]
    assert encoded.index.tolist() == [0, 1, 2, 3, 4]
    assert encoded["n"].fillna(-1).tolist() == [1, -1, -1, -1, 5]
    assert encoded["c"].cat.codes.tolist() == [0, 1, -1, 0, -1]  # a name that no train row has is missing


@pytest.mark.parametrize("labels", [2, 3])
def test_the_rate_of_a_name_does_not_hold_the_rows_own_label(labels):
    """Every name occurs once, so honest rates cannot show a row's label, and dishonest ones show nothing else."""
    true = np.arange(200) % labels
    frame = pd.DataFrame({"tags": [f"t{i}" for i in range(200)]})
    encoded, _ = encode_columns(frame, TabularSpec.of(multi="tags"), true, np.arange(150), np.arange(150, 200))
    assert encoded.shape[1] == 4 * (1 if labels == 2 else labels)
    own = [encoded.loc[np.flatnonzero(true[:150] == label)].mean().to_numpy() for label in range(labels)]
    np.testing.assert_allclose(own[0], own[1], atol=0.1)


def test_a_name_tells_of_the_rows_that_have_it():
    true = np.arange(200) % 2
    frame = pd.DataFrame({"tags": [f"{'even' if i % 2 == 0 else 'odd'} both" for i in range(199)] + [""]})
    encoded, _ = encode_columns(frame, TabularSpec.of(multi="tags"), true, np.arange(150), np.arange(150, 200))
    mean = encoded.iloc[:, 0]
    assert mean[150:198:2].max() < -1 < 1 < mean[151:198:2].min()
    assert encoded.loc[199].isna().all(), "a row without names has no rate"


def test_columns_that_say_nothing_and_a_rare_label_do_not_stop_the_trees():
    frame = pd.DataFrame({"n": [""] * 60, "c": [""] * 60, "tags": ["a"] * 60})
    true = np.array([2] + [0, 1] * 29 + [0])
    spec = TabularSpec.of(numeric=("n",), categorical=("c",), multi="tags")
    encoded, categories = encode_columns(frame, spec, true, np.arange(50), np.arange(50, 60))
    trees = boosted_trees(3, categories, seed=0).fit(encoded.loc[np.arange(50)], true[:50])
    assert np.isfinite(trees.predict_proba(encoded)).all()


def test_many_labels_get_fewer_rounds_of_larger_steps():
    rounds = [boosted_trees(classes, None, 0) for classes in (2, 3, 77)]
    assert [trees.max_iter for trees in rounds] == [300, 200, 50]
    assert [trees.learning_rate * trees.max_iter for trees in rounds] == pytest.approx([15] * 3)
