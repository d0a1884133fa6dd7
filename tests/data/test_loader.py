"""Rows become packs: nothing lost, nothing invented, and what fills a pack counts for nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bertforge.columns.encoder import TabularConfig
from bertforge.data.loader import IGNORED, Examples, PackShape, epoch_plan, load, sorted_plan
from bertforge.data.tokens import TokenStore
from bertforge.training.optim import make_optimizer
from bertforge.training.step import EagerStep
from tests.model.tiny import tiny_bert

SEP = 9
# Three rows of 3, 2 and 4 tokens; every row ends with SEP.
STORE = TokenStore(np.array([1, 2, SEP, 1, SEP, 1, 3, 4, SEP], np.uint16), np.array([0, 3, 5, 9]))
COLUMNS = {
    "numeric": np.array([[0.5], [1.5], [2.5]], np.float32),
    "categorical": np.array([[1], [2], [0]]),
    "multi": np.array([[1, 2], [0, 0], [2, 0]]),
}
EXAMPLES = Examples(STORE, np.array([1, 0, 1]), sep_id=SEP, max_length=8, tabular=COLUMNS)
CPU = torch.device("cpu")


def test_a_pack_worked_by_hand():
    batch, labels = EXAMPLES.pack(np.array([2, 0]))
    assert batch.input_ids.tolist() == [1, 3, 4, SEP, 1, 2, SEP]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 4
    assert batch.tabular["numeric"].tolist() == [[2.5], [0.5]]
    assert batch.tabular["categorical"].tolist() == [[0], [1]]
    assert batch.tabular["multi"].tolist() == [[2, 0], [1, 2]]
    assert labels.tolist() == [1, 1]


def test_a_row_that_is_cut_keeps_its_end():
    batch, _ = replace(EXAMPLES, max_length=3).pack(np.array([2, 1]))
    assert batch.input_ids.tolist() == [1, 3, SEP, 1, SEP]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert STORE.ids.tolist() == [1, 2, SEP, 1, SEP, 1, 3, 4, SEP], "the store itself is not written to"


def filled(shape=None):
    examples = replace(EXAMPLES, max_length=4)
    shape = shape or PackShape(tokens=16, sequences=6, step=16)
    return examples.pack(np.arange(3)), examples.pack(np.arange(3), shape)


def test_a_filled_pack_worked_by_hand():
    _, (batch, labels) = filled()
    assert batch.input_ids.tolist() == [*STORE.ids.tolist(), 0, 0, 0, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9, 13, 16, 16], "a full filler, a short one, an empty one"
    assert batch.max_seqlen == 4
    assert labels.tolist() == [1, 0, 1, IGNORED, IGNORED, IGNORED]
    assert batch.tabular["numeric"].shape == (6, 1)
    assert batch.tabular["multi"][3:].tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("tokens", [9, 10, 16])
def test_what_fills_a_pack_changes_neither_logits_nor_loss_nor_gradients(tokens):
    config = TabularConfig.of(numeric=1, categorical=(3,), multi=3, bins=2, embedding_size=3, hidden_size=4)
    model = tiny_bert(tabular=config)
    optimizer = make_optimizer(model, 2e-5, 2e-5, 0.01)
    step = EagerStep(
        model, optimizer, torch.tensor([1.0, 3.0]), label_smoothing=0.1, max_grad_norm=1e9, precision="fp32"
    )
    results = []
    plain, full = filled(PackShape(tokens=tokens, sequences=6, step=tokens))
    wrong = (full[0], full[1].clamp_min(0))  # as if the fillers were rows of class 0
    for batch, labels in (plain, full, wrong):
        loss = step.backward(batch, labels)
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((model(batch)[:3].detach(), loss, gradients))
    for left, right in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)
    assert (results[2][1] - results[0][1]).abs() > 1e-3


def test_one_shape_holds_every_pack_of_a_plan():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, size=200)
    store = TokenStore(np.ones(lengths.sum(), np.uint16), np.concatenate([[0], np.cumsum(lengths)]))
    examples = Examples(store, np.zeros(200, np.int64), SEP, max_length=16)
    plans = [epoch_plan(examples, np.arange(200), 64, None, seed=1, epoch=epoch) for epoch in range(3)]
    shape = PackShape.of(plans, examples)
    assert shape.tokens <= 64
    for plan in plans:
        for (batch, labels), rows in zip(load(examples, plan, CPU, shape), plan, strict=True):
            assert batch.input_ids.shape == batch.position_ids.shape == (shape.tokens,)
            assert batch.cu_seqlens.shape == (shape.sequences + 1,)
            assert labels.shape == (shape.sequences,)
            bounds = batch.cu_seqlens.tolist()
            assert bounds[-1] == shape.tokens, "every token belongs to a sequence"
            assert bounds == sorted(bounds)
            assert max(np.diff(bounds)) <= 16
            assert (labels != IGNORED).sum() == len(rows)


def test_packs_of_many_sizes_get_few_shapes_and_little_filling():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, size=3200)
    store = TokenStore(np.ones(lengths.sum(), np.uint16), np.concatenate([[0], np.cumsum(lengths)]))
    examples = Examples(store, np.zeros(3200, np.int64), SEP, max_length=64)
    plan = list(np.arange(3200).reshape(100, 32))  # as many rows a pack, not tokens
    sizes = np.array([examples.lengths(rows).sum() for rows in plan])
    assert len(set(sizes.tolist())) > 50
    one, few = (PackShape.of([plan], examples, shapes) for shapes in (1, 16))
    found = []
    for rows in plan:
        batch, labels = examples.pack(rows, few)
        assert int(batch.cu_seqlens[-1]) == len(batch.input_ids) == len(batch.position_ids)
        assert len(labels) == few.sequences
        found.append(len(batch.input_ids))
    assert len(set(found)) <= 16
    assert max(found) == few.tokens == one.tokens == sizes.max()
    assert all(sizes <= found)
    assert sum(found) < 1.06 * sizes.sum() < 1.2 * sizes.sum() < len(plan) * one.tokens


def test_an_epoch_holds_every_row_once_and_its_order_hangs_on_seed_and_epoch_alone():
    plan = epoch_plan(EXAMPLES, np.array([0, 2, 1]), 5, None, seed=3, epoch=1)
    assert sorted(np.concatenate(plan).tolist()) == [0, 1, 2]
    many = np.arange(3).repeat(20)

    def order(seed, epoch):
        return np.concatenate(epoch_plan(EXAMPLES, many, 50, None, seed, epoch)).tolist()

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)


def test_evaluation_begins_with_the_longest_rows():
    lengths = np.array([3, 9, 1, 9, 4])
    plan = sorted_plan(lengths, 10)
    assert [part.tolist() for part in plan] == [[1], [3], [4, 0, 2]]


def test_load_gives_the_packs_in_order():
    plan = [np.array([1]), np.array([2, 0])]
    loaded = [labels.tolist() for _, labels in load(EXAMPLES, plan, CPU)]
    assert loaded == [[0], [1, 1]]
    assert list(load(EXAMPLES, [], CPU)) == []


def test_an_error_of_the_loading_thread_is_raised_where_packs_are_asked_for():
    loading = load(EXAMPLES, [np.array([0]), np.array([99])], CPU)
    next(loading)
    with pytest.raises(IndexError, match=r"99|100"):
        next(loading)


def test_an_error_of_the_plan_itself_is_raised_too():
    def plan():
        yield np.array([0])
        raise RuntimeError("the plan broke")

    with pytest.raises(RuntimeError, match="the plan broke"):
        list(load(EXAMPLES, plan(), CPU))
