from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bertforge.data.concerns import concerns, shares_differ
from bertforge.data.prepared import PreparedData


def prepared(kept: dict[str, int], aside: dict[str, int], unlabelled: int = 0) -> PreparedData:
    rows = sum(aside.values()) + unlabelled
    facts = {
        "rows": sum(kept.values()),
        "label_counts": kept,
        "set_aside": {"not UTF-8": {"rows": rows, "lines": []}} if rows else {},
        "set_aside_labels": aside,
    }
    return PreparedData(Path("data"), facts)


def test_a_table_that_is_fine_is_no_concern() -> None:
    assert concerns(prepared({"a": 5000, "b": 4000}, {})) == []
    assert concerns(prepared({"a": 5000, "b": 4000}, {"a": 50, "b": 39})) == []


def test_more_than_one_percent_set_aside_is_told() -> None:
    (said,) = concerns(prepared({"a": 5000, "b": 4000}, {}, unlabelled=100))
    assert said == "100 of 9,100 rows (1.1%) were set aside and will not be learnt: see data/set_aside.jsonl"


def test_rows_set_aside_that_are_unlike_the_others_are_told() -> None:
    (said,) = concerns(prepared({"ham": 9000, "spam": 1000}, {"ham": 10, "spam": 15}))
    assert "60.0% of them are 'spam', but 10.0% of the rows kept" in said
    assert concerns(prepared({"ham": 9000, "spam": 1000}, {"ham": 3, "spam": 5})) == [], "too few to tell"


def test_shares_are_compared_at_one_in_a_thousand() -> None:
    """The tabulated quantile of chi-squared with 1 degree of freedom is 10.83."""
    assert shares_differ([500, 500], [68, 32])  # 11.9
    assert not shares_differ([500, 500], [66, 34])  # 9.3
    assert not shares_differ([500, 0], [10, 0])
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(11))
    drawn = [shares_differ(rng.multinomial(5000, shares), rng.multinomial(300, shares)) for _ in range(1000)]
    assert np.mean(drawn) == pytest.approx(0.001, abs=0.004)


def test_labels_that_differ_by_case_are_told() -> None:
    (said,) = concerns(prepared({"Spam": 12, "ham": 900, "spam": 700}, {}))
    assert said.startswith(
        "labels 'Spam' (12 rows) and 'spam' (700 rows) differ only by case or spaces; they are different"
    )
