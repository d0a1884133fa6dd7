"""Served rows beside those of training: counted, added over processes, and judged beside chance."""

import json

import numpy as np
import pandas as pd
import pytest

from bertforge.columns.transform import TabularSpec, TabularTransform
from bertforge.errors import ArtifactError
from bertforge.evaluation.drift import (
    NO_REFERENCE,
    Monitor,
    Quantity,
    Reference,
    by_chance,
    drift,
    fewest,
    stability_index,
)

LABELS = ("open", "closed")


SPEC = TabularSpec.of(numeric=("score",), categorical=("topic",), multi="tags", min_count=1)


def rows_of(rows, seed, longer=1.0, closed=0.4, missing=0.05, unknown=0.02, **other):
    """Lengths, unknown tokens, predicted labels and columns; `other` replaces a column."""
    generator = np.random.default_rng(seed)
    lengths = np.maximum(3, generator.gamma(2, 50 * longer, rows)).astype(np.int64)
    score = generator.lognormal(3, 1, rows).round(2)
    columns = {
        "score": np.where(generator.random(rows) < missing, "", score.astype(str)),
        "topic": generator.choice(["java", "sql", "rust", ""], rows, p=[0.6, 0.25, 0.1, 0.05]),
        "tags": [" ".join(generator.choice(["a", "b", "c"], generator.integers(0, 3))) for _ in range(rows)],
    }
    return (
        lengths,
        np.where(generator.random(rows) < unknown, lengths - 2, 0),
        (generator.random(rows) < closed).astype(np.int64),
        pd.DataFrame(columns).assign(**other),
    )


@pytest.fixture(scope="module")
def transform():
    return TabularTransform.fit(rows_of(5000, 0)[-1], SPEC)


@pytest.fixture(scope="module")
def reference(transform):
    lengths, unknown, predicted, columns = rows_of(5000, 0)
    measured = Reference.measure(lengths, unknown, LABELS, predicted, transform(columns), transform)
    return Reference.of(json.loads(json.dumps({"reference": measured.to_dict()})))


@pytest.fixture(scope="module")
def told(reference, transform):
    """Snapshots of a monitor that was asked some lots of rows, and what is told of them."""

    def told(*lots, window=10_000):
        monitor = Monitor(reference, transform, window)
        for lengths, unknown, predicted, columns in lots:
            monitor.add(lengths, unknown, predicted, transform(columns))
        return drift(reference, [json.loads(json.dumps(monitor.snapshot()))])

    return told


def drifted(found):
    return {name for name, quantity in found["quantities"].items() if quantity["drift"] in ("some", "much")}


def test_rows_like_those_of_training_have_not_drifted(told):
    for rows in (1, 30, 300, 4000):
        found = told(rows_of(rows, rows))
        assert found["rows"] == rows
        assert drifted(found) == set(), rows
    alike = found["quantities"]["tokens"]
    assert alike["psi"] < 0.02
    assert alike["by_chance"] < 0.05
    assert sum(alike["served"]) == pytest.approx(1, abs=1e-4)
    assert len(alike["bins"]) == len(alike["served"]) == len(alike["training"])


@pytest.mark.parametrize(
    ("change", "quantities"),
    [
        ({"longer": 2.0}, {"tokens"}),
        ({"closed": 0.9}, {"label"}),
        ({"missing": 0.6}, {"column score"}),
        ({"unknown": 0.3}, {"unknown tokens"}),
    ],
)
def test_what_changed_is_what_is_told(told, change, quantities):
    found = told(rows_of(2000, 7, **change))
    assert drifted(found) == quantities
    for name in quantities:
        assert found["quantities"][name]["psi"] > found["quantities"][name]["by_chance"]


def test_new_names_and_numbers_out_of_range_are_seen(told):
    found = told(rows_of(2000, 7, topic="cobol", score="-5", tags="z"))
    assert drifted(found) == {"column topic", "column score", "column tags"}
    topic, score = (found["quantities"][f"column {name}"] for name in ("topic", "score"))
    assert topic["served"][topic["bins"].index("other or missing")] == 1
    assert score["served"][0] == 1, "lower than any train row"


def test_a_few_odd_rows_are_chance(told):
    lengths, unknown, _, columns = rows_of(4, 3)
    found = told((lengths, unknown, np.ones(4, np.int64), columns))
    assert found["quantities"]["label"]["psi"] > 0.25, "by the old rule of banks it would have drifted"
    assert found["quantities"]["label"]["psi"] < found["quantities"]["label"]["by_chance"]


@pytest.mark.parametrize("counts", [(1, *[1000] * 10, 0, 0), (20_000, 0, 0, 0, 0), (500, 500, 0), (1, *[4] * 10, 0, 0)])
def test_one_odd_row_is_no_drift_and_as_many_as_make_one_are(counts):
    edges = tuple(map(float, range(len(counts) - 2)))
    reference, least = Reference({"tokens": Quantity(counts, edges)}), fewest(counts)
    assert 15 < least <= min(250, sum(counts))

    def judged(rows, odd):
        usual = np.diff(np.round(np.cumsum((0, *counts)) * (rows - odd) / sum(counts)).astype(int))
        served = (usual + odd * (np.arange(len(counts)) == len(counts) - 1)).tolist()
        found = drift(reference, [{"rows": [rows], "tokens": served}])
        assert found["fewest"] == least
        return found["quantities"]["tokens"]["drift"]

    assert judged(1, 1) is judged(least - 1, least - 1) is None
    assert judged(least, 0) == judged(least, 1) == "none"
    assert judged(least, least // 2) == "much"


def test_chance_is_exceeded_once_in_a_hundred_times(reference):
    generator = np.random.default_rng(5)
    for name in ("tokens", "column topic", "label"):
        training = np.array(reference.quantities[name].counts)
        for rows in (32, 1024):
            then = generator.multinomial(training.sum(), training / training.sum(), 4000)
            now = generator.multinomial(rows, training / training.sum(), 4000)
            share = (stability_index(then, now) > by_chance(tuple(training), rows)).mean()
            assert 0.002 < share < 0.025, (name, rows)


@pytest.mark.parametrize("rows", [1, 3, 402, 4000])
def test_the_only_label_of_a_few_rows_has_not_drifted_while_it_stays_the_only_one(rows):
    label = Quantity.of_names(np.full(16, 2), LABELS)
    reference = Reference({"label": label})
    same, other = (
        drift(reference, [{"rows": [rows], "label": label.count(np.full(rows, number)).tolist()}]) for number in (2, 1)
    )
    assert drifted(same) == set()
    assert drifted(other) == ({"label"} if rows >= 16 else set())


def test_counters_of_processes_are_added(reference, transform, told):
    lots = [rows_of(500, seed) for seed in range(3)]
    monitors = [Monitor(reference, transform) for _ in lots]
    for monitor, (lengths, unknown, predicted, columns) in zip(monitors, lots, strict=True):
        monitor.add(lengths, unknown, predicted, transform(columns))
    apart = drift(reference, [monitor.snapshot() for monitor in monitors])
    assert apart == told(*lots)
    assert apart["rows"] == 1500


def test_old_rows_leave_the_window(told):
    odd, usual = rows_of(300, 1, longer=3.0), [rows_of(100, seed) for seed in range(2, 12)]
    assert drifted(told(odd, window=400)) == {"tokens"}
    found = told(odd, *usual, window=400)
    assert drifted(found) == set()
    assert 200 <= found["rows"] <= 400


def test_a_row_without_text_has_no_label(told):
    lengths, unknown, _, columns = rows_of(1, 0)
    label = told((lengths, unknown, np.array([-1]), columns))["quantities"]["label"]
    assert label["bins"] == ["open", "closed", "other or missing"]
    assert label["served"] == [0, 0, 1]


def test_nothing_served_and_nothing_known_are_told(reference, transform):
    found = drift(reference, [Monitor(reference, transform).snapshot()])
    assert found["rows"] == 0
    assert {(each["psi"], each["drift"]) for each in found["quantities"].values()} == {(None, None)}
    json.dumps(found, allow_nan=False)
    assert Reference.of({}) is None
    assert drift(None, []) == {"rows": 0, "fewest": 0, "missing": NO_REFERENCE, "quantities": {}}
    with pytest.raises(ArtifactError, match="record of its train rows is damaged"):
        Reference.of({"reference": {"tokens": {"counted": [1]}}})


def test_a_number_that_never_varied_and_one_that_was_never_there():
    constant = Quantity.of_numbers(np.full(50, 3.0))
    assert constant.count(np.array([3.0, 2.0, 4.0, np.nan])).tolist() == [1, 1, 1, 1]
    absent = Quantity.of_numbers(np.full(5, np.nan))
    assert absent.counts[-1] == 5
    assert absent.count(np.array([1.0, np.nan])).tolist()[-2:] == [1, 1]


def test_the_most_frequent_names_have_a_bin():
    often = np.repeat(np.arange(1, 41), np.arange(1, 41))
    names = Quantity.of_names(often, [f"n{number}" for number in range(1, 41)])
    assert names.names == tuple(f"n{number}" for number in range(21, 41))
    assert sum(names.counts) == len(often)
    assert names.count(np.array([40, 1, 0, 99])).tolist() == [*[0] * 19, 1, 3]
    several = names.count(np.array([[40, 39, 0], [0, 0, 0], [1, 0, 0]]))
    assert several.tolist() == [*[0] * 18, 1, 1, 2], "each name of a row, and a row without any once"
