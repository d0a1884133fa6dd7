"""Columns become numbers by what the train rows taught, and by nothing else."""

import json
from dataclasses import replace
from math import e, sqrt

import numpy as np
import pandas as pd
import pytest

from bertforge.data.tabular import TabularSpec, TabularTransform
from bertforge.errors import DataError, UsageError

SPEC = TabularSpec(numeric=("n", "x"), log=("x",), categorical=("c",), multi="m", min_count=2)
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
    np.testing.assert_array_equal(arrays.numeric, np.array([[1, 0], [3, e - 1], [np.nan, 1 - e]], np.float32))
    assert arrays.numeric.dtype == np.float32
    assert transform.mean == pytest.approx((2, 0), abs=1e-7), "of the signed logs 0, 1 and -1"
    assert transform.std == pytest.approx((1, sqrt(2 / 3)))
    assert arrays.categorical.tolist() == [[1], [1], [0]], "b occurs once, and min_count is 2"
    assert arrays.multi.tolist() == [[1, 2], [2, 1], [0, 0]], "u occurs once"


def test_what_was_learnt_says_how_large_the_model_must_be():
    transform = fit()
    assert transform.category_sizes == (2,)
    assert transform.multi_size == 3
    assert transform.indicators == ("n",)


def test_rows_that_were_not_fitted_change_nothing():
    transform = fit()
    before = transform(TRAIN)
    other = pd.DataFrame({"n": ["1000", ""], "x": ["", "-5"], "c": ["zzz", "a"], "m": ["q v", "w"]})
    arrays = transform(pd.concat([TRAIN, other], ignore_index=True))
    assert np.array_equal(arrays.numeric[:3], before.numeric, equal_nan=True)
    assert np.array_equal(arrays.categorical[:3], before.categorical)
    assert np.array_equal(arrays.multi[:3], before.multi)
    assert arrays.numeric[3, 0] == 1000
    assert arrays.categorical[3:].tolist() == [[0], [1]], "an unseen value is 0"
    assert arrays.multi[3:].tolist() == [[1, 0], [2, 0]], "an unseen value of several is left out"
    # Fitted on them, they do.
    assert fit(pd.concat([TRAIN, other], ignore_index=True)).mean != transform.mean


def test_what_is_no_finite_number_is_missing_and_unknown_names_are_zero():
    frame = pd.DataFrame({"n": [None, "2", "1e400"], "x": [np.nan, "-1e39", "many"], "c": [None, np.nan, "z"], "m": ""})
    arrays = fit()(frame)
    assert np.isnan(arrays.numeric).tolist() == [[True, True], [False, True], [True, True]], "1e39 is past float32"
    assert arrays.categorical.tolist() == [[0], [0], [0]]
    assert not arrays.multi.any()


def test_the_log_is_signed_and_only_where_asked_for():
    plain = fit(spec=replace(SPEC, log=()))
    assert fit().std[1] == pytest.approx(sqrt(2 / 3))
    assert plain.std[1] == pytest.approx((e - 1) * sqrt(2 / 3))


@pytest.mark.parametrize("value", [7, 0.1])
def test_a_constant_column_has_deviation_one(value):
    transform = TabularTransform.fit(pd.DataFrame({"n": [value] * 3}), TabularSpec(numeric=("n",)))
    assert transform.mean == pytest.approx((value,))
    assert transform.std == (1,), "and no rounding error as its deviation"


def test_bins_are_quantiles_of_the_scaled_train_values_and_of_where_they_are_missing():
    spec = TabularSpec(numeric=("n",), bins=2, hidden_size=4)
    transform = TabularTransform.fit(pd.DataFrame({"n": [0, 1, 2, 3, 10]}), spec)
    scaled = (np.array([0, 2, 10]) - 3.2) / np.std([0, 1, 2, 3, 10])
    assert transform.edges == (pytest.approx(tuple(scaled)),)
    with_gap = TabularTransform.fit(pd.DataFrame({"n": [0, 4, None]}), spec)
    assert with_gap.edges == ((-1, 0, 1), (0, 0, 1)), "a missing value is the mean"
    assert fit().edges == ()


def test_it_comes_back_from_json():
    for spec in (SPEC, replace(SPEC, bins=3, hidden_size=4)):
        transform = fit(spec=spec)
        again = TabularTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
        assert again == transform
        assert np.array_equal(again(TRAIN).numeric, transform(TRAIN).numeric, equal_nan=True)


def test_a_column_of_mostly_words_declared_numeric_is_an_error():
    spec = TabularSpec(numeric=("n", "c"))
    with pytest.raises(DataError, match=r"3 of 3 values of column 'c' are no numbers: 'a'; .* under categorical"):
        fit(spec=spec)
    with pytest.raises(DataError, match="2 of 3 values of column 'c' are no numbers: '14,013'"):
        fit(TRAIN.assign(c=["14,013", "1,5", "5"]), spec)
    with pytest.raises(DataError, match="column 'c' holds no number in the train rows"):
        fit(TRAIN.assign(c=["", None, " "]), spec)


def test_a_few_values_that_are_no_numbers_count_as_missing_and_that_is_said(caplog):
    transform = fit(TRAIN.assign(c=["14,013", "5", ""]), TabularSpec(numeric=("n", "c")))
    assert transform.mean[1] == 5
    assert caplog.messages == ["1 of 2 values of column 'c' are no numbers: '14,013'; such values count as missing"]


def test_a_missing_derived_column_is_named_with_the_sources_it_lacks():
    transform = fit(pd.DataFrame({"account_age_days": [1.0, 2.0]}), TabularSpec(numeric=("account_age_days",)))
    table = pd.DataFrame({"Title": ["a"], "BodyMarkdown": ["b"], "PostCreationDate": [""], "title_words": [1.0]})
    with pytest.raises(DataError) as caught:
        transform(table)
    assert str(caught.value) == (
        "the model reads 'account_age_days', made from OwnerCreationDate, which the table lacks; "
        "it has Title, BodyMarkdown, PostCreationDate"
    )


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(DataError, match="reads column 'x', but the table has n, c, m"):
        fit()(TRAIN.drop(columns="x"))


def test_a_slice_is_the_rows_asked_for():
    arrays = fit()(TRAIN)[np.array([2, 0])]
    assert arrays.categorical.tolist() == [[0], [1]]
    assert arrays.multi.tolist() == [[0, 0], [1, 2]]
    assert np.isnan(arrays.numeric[:, 0]).tolist() == [True, False]


def test_rows_are_put_back_where_they_stood():
    rows, whole = np.array([2, 0]), fit()(TRAIN)
    among = whole[rows].among(rows, 3)
    for name, array in vars(among).items():
        assert np.array_equal(array[rows], getattr(whole, name)[rows], equal_nan=True), name
        assert not array[1].any(), name


def test_a_section_without_columns_or_with_a_stray_log_is_refused():
    with pytest.raises(UsageError, match="names no column"):
        TabularSpec()
    with pytest.raises(UsageError, match=r"log names \['y'\], which are not among numeric"):
        TabularSpec(numeric=("n",), log=("y",))
    assert TabularSpec(numeric=("n",), categorical=("n", "c"), multi="m").columns == ["n", "c", "m"]
