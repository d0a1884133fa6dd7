"""Served rows beside those of training: counted, added over processes, and judged beside chance."""

import json

import numpy as np
import pandas as pd
import pytest

from bertforge.errors import ArtifactError
from bertforge.evaluation.drift import (
    NO_REFERENCE,
    Monitor,
    Quantity,
    Reference,
    by_chance,
    drift,
    stability_index,
)

LABELS = ("open", "closed")


def rows_of(rows, seed, longer=1.0, closed=0.4, missing=0.05, unknown=0.02):
    """Lengths, unknown tokens, predicted labels and columns."""
    generator = np.random.default_rng(seed)
    lengths = np.maximum(3, generator.gamma(2, 50 * longer, rows)).astype(np.int64)
    score = generator.lognormal(3, 1, rows).round(2)
    columns = pd.DataFrame(
        {
            "score": np.where(generator.random(rows) < missing, "", score.astype(str)),
            "topic": generator.choice(["java", "sql", "rust", ""], rows, p=[0.6, 0.25, 0.1, 0.05]),
            "tags": [" ".join(generator.choice(["a", "b", "c"], generator.integers(0, 3))) for _ in range(rows)],
        }
    )
    return (
        lengths,
        np.where(generator.random(rows) < unknown, lengths - 2, 0),
        (generator.random(rows) < closed).astype(np.int64),
        columns,
    )


@pytest.fixture(scope="module")
def reference():
    lengths, unknown, predicted, columns = rows_of(5000, 0)
    holds = {"score": "number", "topic": "name", "tags": "names"}
    measured = Reference.measure(lengths, unknown, LABELS, predicted, columns, holds)
    return Reference.of(json.loads(json.dumps({"reference": measured.to_dict()})))


def told(reference, *lots, window=10_000, **changes):
    monitor = Monitor(reference, window)
    for lengths, unknown, predicted, columns in lots:
        monitor.add(lengths, unknown, [LABELS[number] for number in predicted], columns)
    return drift(reference, [monitor.snapshot()])


def drifted(found):
    return {name for name, quantity in found["quantities"].items() if quantity["drift"] != "none"}


def test_rows_like_those_of_training_have_not_drifted(reference):
    for rows in (1, 30, 300, 4000):
        found = told(reference, rows_of(rows, rows))
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
def test_what_changed_is_what_is_told(reference, change, quantities):
    found = told(reference, rows_of(2000, 7, **change))
    assert drifted(found) == quantities
    for name in quantities:
        assert found["quantities"][name]["psi"] > found["quantities"][name]["by_chance"]


def test_new_names_and_numbers_out_of_range_are_seen(reference):
    lengths, unknown, predicted, columns = rows_of(2000, 7)
    other = columns.assign(topic="cobol", score="-5", tags="z")
    found = told(reference, (lengths, unknown, predicted, other))
    assert drifted(found) == {"column topic", "column score", "column tags"}
    topic, score = (found["quantities"][f"column {name}"] for name in ("topic", "score"))
    assert topic["served"][topic["bins"].index("other")] == 1
    assert score["served"][0] == 1, "lower than any train row"


def test_a_few_odd_rows_are_chance(reference):
    lengths, unknown, _predicted, columns = rows_of(4, 3)
    found = told(reference, (lengths, unknown, np.ones(4, np.int64), columns))
    assert found["quantities"]["label"]["psi"] > 0.25, "by the old rule of banks it would have drifted"
    assert drifted(found) == set()


def test_chance_is_exceeded_once_in_a_hundred_times(reference):
    generator = np.random.default_rng(5)
    for name in ("tokens", "column topic", "label"):
        training = np.array(reference.quantities[name].counts)
        for rows in (32, 1024):
            then = generator.multinomial(training.sum(), training / training.sum(), 4000)
            now = generator.multinomial(rows, training / training.sum(), 4000)
            share = (stability_index(then, now) > by_chance(tuple(training), rows)).mean()
            assert 0.002 < share < 0.025, (name, rows)


def test_counters_of_processes_are_added(reference):
    lots = [rows_of(500, seed) for seed in range(3)]
    monitors = [Monitor(reference) for _ in lots]
    for monitor, (lengths, unknown, predicted, columns) in zip(monitors, lots, strict=True):
        monitor.add(lengths, unknown, [LABELS[number] for number in predicted], columns)
    apart = drift(reference, [json.loads(json.dumps(monitor.snapshot())) for monitor in monitors])
    assert apart == told(reference, *lots)
    assert apart["rows"] == 1500


def test_old_rows_leave_the_window(reference):
    odd, usual = rows_of(100, 1, longer=3.0), [rows_of(100, seed) for seed in range(2, 12)]
    assert drifted(told(reference, odd, window=400)) == {"tokens"}
    found = told(reference, odd, *usual, window=400)
    assert drifted(found) == set()
    assert 200 <= found["rows"] <= 400


def test_rows_without_text_have_no_label(reference):
    monitor = Monitor(reference)
    monitor.add(np.array([2]), np.array([0]), [None], rows_of(1, 0)[-1])
    label = drift(reference, [monitor.snapshot()])["quantities"]["label"]
    assert label["served"][label["bins"].index("missing")] == 1


def test_nothing_served_and_nothing_known_are_told(reference):
    found = drift(reference, [Monitor(reference).snapshot()])
    assert found["rows"] == 0
    assert found["quantities"]["tokens"]["psi"] is None
    json.dumps(found, allow_nan=False)
    assert Reference.of({}) is None
    assert drift(None, []) == {"rows": 0, "missing": NO_REFERENCE, "quantities": {}}
    with pytest.raises(ArtifactError, match="record of its train rows is damaged"):
        Reference.of({"reference": {"tokens": {}}})


def test_bins_of_a_number_that_hardly_varies():
    constant = Quantity.of_numbers([3.0] * 50)
    assert constant.count([3.0, 2.0, 4.0, "", "x"]).tolist() == [1, 1, 1, 2]
    empty = Quantity.of_numbers(["", ""])
    assert empty.count([1.0, ""]).tolist()[-1] == 1
    infinite = Quantity.of_numbers([1.0, 2.0, np.inf])
    assert infinite.counts[-1] == 1, "no number the model could read"


def test_names_that_are_frequent_have_a_bin():
    values = [f"n{number}" for number in range(40) for _ in range(number + 1)]
    names = Quantity.of_names(values)
    assert len(names.names) == 20
    assert names.names[0] == "n39"
    assert sum(names.counts) == len(values)
    assert names.counts[-2] > 0
