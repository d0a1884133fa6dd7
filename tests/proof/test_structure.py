"""The probes reach every part, and a difference that rounding would hide is seen."""

import numpy as np
import pytest
import torch

from bertforge.columns.encoder import TabularConfig
from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.evaluation.logits import predict_logits
from bertforge.proof.golden import GoldenRows
from bertforge.proof.structure import compare, crowded, probes
from bertforge.proof.tolerances import STRUCTURE
from tests.engines.building import built
from tests.model.tiny import tiny_bert


@pytest.fixture(scope="module")
def model():
    return tiny_bert(vocab_size=100, max_position_embeddings=64)


@pytest.fixture(scope="module")
def golden(model):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, size=40)
    ids = rng.integers(5, 90, size=lengths.sum()).astype(np.uint16)
    examples = Examples(TokenStore(ids, np.r_[0, np.cumsum(lengths)]), np.zeros(40, np.int64), 3, 48)
    return GoldenRows.record(model, examples, np.arange(40))


def wanted(model, asked):
    return predict_logits(model, asked, np.arange(len(asked.labels)), "fp32")


def test_probes_have_every_length_order_and_neighbour(golden, model):
    asked = probes(golden, model.config)
    lengths = asked.lengths(np.arange(len(asked.labels)))
    assert {1, 3, asked.max_length} <= set(lengths.tolist())
    ids = [asked.pack(np.array([row]))[0].input_ids.tolist() for row in range(len(asked.labels))]
    first = ids[0]
    assert [first[0], *first[-2:0:-1], first[-1]] in ids[1:], "the same tokens in another order"
    assert len({token for row in ids for token in row}) > 60


def test_a_healthy_engine_is_the_model(golden, model, tmp_path):
    asked = probes(golden, model.config)
    found = compare(built("onnxruntime", model, tmp_path), asked, wanted(model, asked))
    assert found.holds
    assert found.largest_difference < STRUCTURE / 10
    assert found.to_dict()["probes"] == len(asked.labels)


def test_a_head_that_is_hardly_weaker_is_seen(golden, model, tmp_path):
    asked = probes(golden, model.config)
    expected = wanted(model, asked)
    lesser = tiny_bert(vocab_size=100, max_position_embeddings=64)
    lesser.load_state_dict(model.state_dict())
    size = model.config.head_dim
    lesser.bert.encoder.layer[0].attention.output.dense.weight.data[:, :size] *= 0.97
    found = compare(built("onnxruntime", lesser, tmp_path), asked, expected)
    assert not found.holds
    assert found.largest_difference < 0.5, "and it is no gross error"


def test_a_logit_that_is_no_number_does_not_hold(golden, model, tmp_path):
    asked = probes(golden, model.config)
    expected = wanted(model, asked)
    expected[3] = np.nan
    assert not compare(built("onnxruntime", model, tmp_path), asked, expected).holds


def test_a_crowd_stands_together_at_the_largest_length(golden, model, tmp_path):
    asked = probes(golden, model.config)
    seen = []

    class Watched:
        packed = False

        def logits(self, batch):
            seen.append(tuple(batch.input_ids.shape))
            return np.zeros((len(batch.input_ids), 2), np.float32)

    crowded(Watched(), asked, np.arange(5))
    assert seen == [(5, 48)]


def test_every_name_of_a_column_is_asked_and_a_missing_number(tmp_path):
    """A wrong embedding of a name that no golden row has."""
    config = TabularConfig.of(numeric=1, categorical=(7, 3), multi=5, bins=0, embedding_size=4, hidden_size=8)
    model = tiny_bert(vocab_size=100, max_position_embeddings=64, tabular=config)
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, size=16)
    ids = rng.integers(5, 90, size=lengths.sum()).astype(np.uint16)
    columns = {
        "numeric": rng.normal(size=(16, 1)).astype(np.float32),
        "categorical": np.ones((16, 2), np.int64),
        "multi": np.ones((16, 2), np.int64),
    }
    examples = Examples(TokenStore(ids, np.r_[0, np.cumsum(lengths)]), np.zeros(16, np.int64), 3, 48, columns)
    asked = probes(GoldenRows.record(model, examples, np.arange(16)), model.config)
    assert {tuple(row) for row in asked.tabular["categorical"][-7:]} == {(i, min(i, 2)) for i in range(7)}
    assert set(range(5)) <= set(asked.tabular["multi"][:, 0].tolist())
    assert np.isnan(asked.tabular["numeric"]).any()
    expected = wanted(model, asked)
    assert compare(built("onnxruntime", model, tmp_path), asked, expected).holds
    with torch.no_grad():
        getattr(model.tabular.categorical, "0").weight[5] += 0.1
    assert not compare(built("onnxruntime", model, tmp_path), asked, expected).holds
