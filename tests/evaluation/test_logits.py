"""Logits come in the order of the rows asked for, whatever order they were computed in."""

import numpy as np
import pytest
import torch
from tests.model.tiny import tiny_bert

from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.evaluation import logits as module
from bertforge.evaluation.logits import predict_logits

LENGTHS = np.array([5, 2, 9, 2, 7, 3])
TOKENS = np.random.default_rng(0).integers(1, 50, LENGTHS.sum())
EXAMPLES = Examples(TokenStore(TOKENS, np.concatenate([[0], LENGTHS.cumsum()])), np.full(6, -1), 2, max_length=8)


@pytest.mark.parametrize("budget", [8, 16_384])
def test_rows_come_out_in_the_order_asked_for(monkeypatch, budget):
    monkeypatch.setattr(module, "TOKENS_PER_PACK", budget)
    model, rows, seen = tiny_bert(), np.array([4, 0, 2, 5]), []
    found = predict_logits(model, EXAMPLES, rows, "fp32", seen.append)
    with torch.no_grad():
        alone = [model(EXAMPLES.pack(np.array([row]))[0])[0].numpy() for row in rows]
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert np.abs(np.diff(found, axis=0)).min() > 1e-4, "the rows are told apart"
    assert sum(seen) == 4
    assert len(seen) == (3 if budget == 8 else 1), "8, 7, and 5 with 3 tokens"


def test_the_model_is_left_in_the_mode_it_was_in_and_drops_nothing_out():
    model = tiny_bert().train()
    first, second = (predict_logits(model, EXAMPLES, np.arange(6), "fp32") for _ in range(2))
    assert model.training
    assert np.array_equal(first, second)
    model.eval()
    assert np.array_equal(predict_logits(model, EXAMPLES, np.arange(6), "fp32"), first)
    assert not model.training


def test_bf16_rounds_and_still_gives_float32():
    exact, rounded = (predict_logits(tiny_bert(), EXAMPLES, np.arange(6), name) for name in ("fp32", "bf16"))
    assert rounded.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 0.2
