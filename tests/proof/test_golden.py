"""Golden rows: a few rows of all lengths that tell a model from one that was changed."""

import json

import numpy as np
import torch

from bertforge.columns.encoder import TabularConfig
from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.proof.golden import GoldenRows
from bertforge.proof.tolerances import SAVED
from tests.model.tiny import tiny_bert


def test_they_are_of_all_lengths_come_back_from_json_and_notice_a_change():
    rng, lengths = np.random.default_rng(0), np.arange(40) % 20 + 2
    tokens = TokenStore(rng.integers(1, 50, lengths.sum()).astype(np.uint16), np.concatenate([[0], lengths.cumsum()]))
    model = tiny_bert()
    golden = GoldenRows.record(model, Examples(tokens, np.full(40, -1), 2, max_length=16), np.arange(5, 40))
    again = GoldenRows.from_dict(json.loads(json.dumps(golden.to_dict())))
    found = again.examples.lengths(np.arange(16))
    assert (found.min(), found.max(), len(set(found.tolist()))) == (2, 16, 12)
    assert again.difference(model) < 1e-5
    with torch.no_grad():
        model.classifier.bias[0] += 2 * SAVED
    assert SAVED < again.difference(model) < 3 * SAVED


def test_when_there_are_few_rows_all_are_taken():
    tokens = TokenStore(np.array([1, 2, 1, 3, 2], np.uint16), np.array([0, 2, 5]))
    golden = GoldenRows.record(tiny_bert(), Examples(tokens, np.full(2, -1), 2, max_length=16), np.arange(2))
    assert golden.logits.shape == (2, 2)


def test_columns_travel_with_the_rows():
    tokens = TokenStore(np.array([1, 2, 1, 3, 2], np.uint16), np.array([0, 2, 5]))
    columns = {"numeric": np.array([[1.5], [np.nan]], np.float32), "categorical": np.zeros((2, 0), np.int64)}
    model = tiny_bert(tabular=TabularConfig.of(numeric=1))
    golden = GoldenRows.record(model, Examples(tokens, np.full(2, -1), 2, 16, columns), np.array([1, 0]))
    stored = json.dumps(golden.to_dict(), allow_nan=False)
    assert '"numeric": [[1.5], [null]]' in stored, "by length, as the rows are"
    again = GoldenRows.from_dict(json.loads(stored))
    np.testing.assert_array_equal(again.examples.tabular["numeric"], [[1.5], [np.nan]])
    assert again.examples.tabular["categorical"].shape == (2, 0)
    assert again.difference(model) < 1e-5
    again.examples.tabular["numeric"][0] = 0
    assert again.difference(model) > SAVED
