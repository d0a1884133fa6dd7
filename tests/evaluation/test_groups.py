"""Groups: every row in exactly one, Wilson's interval, months and lengths; mistakes in the right order."""

import numpy as np
import pandas as pd
import pytest

from bertforge.errors import DataError
from bertforge.evaluation.groups import by_length, by_month, confident_mistakes, excerpt, wilson_interval

LOGITS = np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 9.0], [2.0, 0.0], [0.0, 5.0], [4.0, 0.0]])
LABELS = np.array([0, 0, 0, 1, 1, 1])  # rows 1, 2, 3 and 5 are wrong
NAMES = ["open", "closed"]


def test_wilson_interval_of_known_cases():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score, without continuity correction)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(5, 5)[1] == 1.0


def test_by_length_puts_every_row_in_one_group_with_edges_inside_the_lower_one():
    groups = by_length(LOGITS, LABELS, [0, 64, 65, 512, 513, 128])
    assert [(g.name, g.rows, g.accuracy) for g in groups] == [
        ("0 to 64", 2, 0.5),
        ("65 to 128", 2, 0.0),
        ("257 to 512", 1, 0.0),
        ("over 512", 1, 1.0),
    ]
    assert all(g.low <= g.accuracy <= g.high for g in groups)
    assert [g.name for g in by_length(LOGITS, LABELS, range(6), edges=(2,))] == ["0 to 2", "over 2"]


def test_by_month_is_in_order_and_counts_rows_without_a_date():
    dates = pd.Series(pd.to_datetime(["2012-07-31", "2011-01-02", None, "2012-07-01", "2011-01-30", None]))
    groups = by_month(LOGITS, LABELS, dates)
    assert [(g.name, g.rows, g.accuracy) for g in groups] == [
        ("2011-01", 2, 0.5),
        ("2012-07", 2, 0.5),
        ("no date", 2, 0.0),
    ]


@pytest.mark.parametrize("dates", [["07/31/2012"] * 6, [1341100800] * 6, [1.5] * 6])
def test_dates_that_are_not_datetime64_are_refused(dates):
    with pytest.raises(DataError, match=r"not datetime64; read them with pandas\.to_datetime"):
        by_month(LOGITS, LABELS, dates)


def test_columns_of_another_length_are_refused():
    with pytest.raises(DataError, match=r"lengths have shape \[5\] for 6 rows"):
        by_length(LOGITS, LABELS, range(5))
    with pytest.raises(DataError, match=r"texts have shape \[1\] for 6 rows"):
        confident_mistakes(LOGITS, LABELS, NAMES, texts=["one"])


def test_mistakes_are_the_wrong_rows_surest_first():
    found = confident_mistakes(LOGITS, LABELS, NAMES, top=3)
    assert [(m.row, m.true, m.predicted) for m in found] == [
        ("2", "open", "closed"),
        ("5", "closed", "open"),
        ("3", "closed", "open"),
    ]
    assert found[0].probability == pytest.approx(1 / (1 + np.exp(-9.0)))
    assert confident_mistakes(LOGITS, LOGITS.argmax(axis=1), NAMES) == ()


def test_mistakes_are_ordered_even_where_probabilities_round_to_one():
    logits = np.array([[0.0, 100.0], [0.0, 300.0], [0.0, 200.0]])
    assert [m.row for m in confident_mistakes(logits, np.zeros(3, dtype=int), NAMES)] == ["1", "2", "0"]


def test_texts_and_ids_go_by_position_not_by_a_pandas_index():
    texts = pd.Series([f"text {i}" for i in range(6)], index=[5, 4, 3, 2, 1, 0])
    ids = pd.Series([f"q{i}" for i in range(6)], index=[5, 4, 3, 2, 1, 0])
    first = confident_mistakes(LOGITS, LABELS, NAMES, texts=texts, row_ids=ids, top=1)[0]
    assert (first.row, first.text) == ("q2", "text 2")


def test_excerpts_are_one_clean_line():
    assert excerpt("a\n\n  b\tc\x00d\u202ee\ud800") == "a b c d e"
    long = excerpt("word " * 200)
    assert len(long) <= 242
    assert long.endswith("word …")
    assert excerpt("x" * 500) == "x" * 240 + " …"
