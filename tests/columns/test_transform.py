"""Columns become numbers by what the train rows taught, and by nothing else."""

import json
from math import e, sqrt

import numpy as np
import pandas as pd
import pytest

from bertforge.columns.encoder import TabularConfig
from bertforge.columns.transform import TabularSpec, TabularTransform
from bertforge.errors import UsageError

SPEC = TabularSpec.of(numeric=("n", "x"), log=("x",), categorical=("c",), multi="m", min_count=2)
BINNED = TabularSpec.of(**SPEC.to_dict() | {"bins": 3, "hidden_size": 4})
TRAIN = pd.DataFrame(
    {
        "n": ["1", "3", ""],
        "x": ["0", str(e - 1), str(1 - e)],  # signed log: 0, 1, -1
        "c": ["a", "a", "b"],
        "m": ["v w", "w v u", ""],
    }
)


def fit(frame=TRAIN, spec=SPEC):
    return TabularTransform.fit(frame, spec)


def test_worked_by_hand():
    transform, arrays = fit(), fit()(TRAIN)
    np.testing.assert_array_equal(arrays["numeric"], np.array([[1, 0], [3, e - 1], [np.nan, 1 - e]], np.float32))
    assert arrays["numeric"].dtype == np.float32
    assert transform.learnt["numeric"].mean == pytest.approx((2, 0), abs=1e-7), "of the signed logs 0, 1 and -1"
    assert transform.learnt["numeric"].std == pytest.approx((1, sqrt(2 / 3)))
    assert arrays["categorical"].tolist() == [[1], [1], [0]], "b occurs once, and min_count is 2"
    assert arrays["multi"].tolist() == [[1, 2], [2, 1], [0, 0]], "u occurs once"


def test_what_was_learnt_says_how_large_the_model_must_be():
    expected = TabularConfig.of(numeric=2, log=(1,), indicators=(0,), categorical=(2,), multi=3, bins=3, hidden_size=4)
    assert fit(spec=BINNED).config == expected


def test_rows_that_were_not_fitted_change_nothing():
    transform = fit()
    before = transform(TRAIN)
    other = pd.DataFrame({"n": ["1000", ""], "x": ["", "-5"], "c": ["zzz", "a"], "m": ["q v", "w"]})
    arrays = transform(pd.concat([TRAIN, other], ignore_index=True))
    assert np.array_equal(arrays["numeric"][:3], before["numeric"], equal_nan=True)
    assert np.array_equal(arrays["categorical"][:3], before["categorical"])
    assert np.array_equal(arrays["multi"][:3], before["multi"])
    assert arrays["numeric"][3, 0] == 1000
    assert arrays["categorical"][3:].tolist() == [[0], [1]], "an unseen value is 0"
    assert arrays["multi"][3:].tolist() == [[1, 0], [2, 0]], "an unseen value of several is left out"
    # Fitted on them, they do.
    assert fit(pd.concat([TRAIN, other], ignore_index=True)).learnt["numeric"].mean != transform.learnt["numeric"].mean


def test_what_is_no_finite_number_is_missing_and_unknown_names_are_zero():
    frame = pd.DataFrame({"n": [None, "2", "1e400"], "x": [np.nan, "-1e39", "many"], "c": [None, np.nan, "z"], "m": ""})
    arrays = fit()(frame)
    assert np.isnan(arrays["numeric"]).tolist() == [[True, True], [False, True], [True, True]], "1e39 is past float32"
    assert arrays["categorical"].tolist() == [[0], [0], [0]]
    assert not arrays["multi"].any()


def test_it_comes_back_from_json():
    for spec in (SPEC, BINNED):
        transform = fit(spec=spec)
        again = TabularTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
        assert again == transform
        assert np.array_equal(again(TRAIN)["numeric"], transform(TRAIN)["numeric"], equal_nan=True)


def test_what_is_saved_is_one_flat_table_as_it_was_from_the_first_release_on():
    """Folders of every version hold these keys: one that changes its place or name makes them unreadable."""
    saved = fit(spec=BINNED).to_dict()
    assert saved["spec"] == {
        "numeric": ("n", "x"), "log": ("x",), "bins": 3, "categorical": ("c",), "multi": "m",
        "min_count": 2, "embedding_size": 16, "hidden_size": 4, "dropout": 0.1,
    }  # fmt: skip
    learnt = {"mean", "std", "indicators", "edges", "vocabularies", "multi_vocabulary"}
    assert saved.keys() == {"spec", *learnt}
    assert fit(spec=BINNED).config.to_dict() == {
        "numeric": 2, "log": (1,), "indicators": (0,), "bins": 3, "categorical": (2,), "multi": 3,
        "embedding_size": 16, "hidden_size": 4, "dropout": 0.1,
    }  # fmt: skip


def test_a_section_without_columns_is_refused():
    with pytest.raises(UsageError, match="names no column; set numeric, categorical or multi, or remove the section"):
        TabularSpec.of(bins=3)


def test_columns_are_told_by_what_their_cells_hold():
    spec = TabularSpec.of(numeric=("n",), categorical=("n", "c"), multi="m")
    assert spec.columns == ["n", "c", "m"], "each once"
    assert (spec.holding("number"), spec.holding("names")) == (["n"], ["m"])
