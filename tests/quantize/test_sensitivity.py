"""Costs are of the units that are on; the search takes back what harms most for its work, and comes to an end."""

import numpy as np
import pytest

from bertforge.model.points import Unit, share_of_work, units
from bertforge.quantize import fake
from bertforge.quantize.sensitivity import Judge, search, table
from tests.model.tiny import tiny_bert

LENGTH = 20.0
ROWS = 100


@pytest.fixture(scope="module")
def model():
    network = tiny_bert()
    fake.insert(network, "int8", "ffn")
    return network


@pytest.fixture(scope="module")
def chosen(model):
    return units(model.config, "ffn")


def judge(model, harm):
    """Of a made-up task: each unit that is on flips `harm[unit]` of the rows, none of them twice."""
    labels = np.zeros(ROWS, int)
    reference = np.tile([1.0, 0.0], (ROWS, 1))
    starts = dict(zip(harm, np.cumsum([0, *harm.values()]), strict=False))

    def logits():
        found = reference.copy()
        for unit, start in starts.items():
            linear = model.get_submodule(unit.points[0])
            if linear.input_quantizer.is_enabled and linear.weight_quantizer.is_enabled:
                found[start : start + harm[unit]] = [0.0, 1.0]
        return found

    return Judge(logits, reference, labels)


@pytest.fixture(scope="module")
def harm(chosen):
    assert [unit.component for unit in chosen] == ["ffn-up", "ffn-down"] * 2
    return dict(zip(chosen, (1, 20, 5, 0), strict=True))


def test_alone_and_spared_are_complements(model, chosen, harm):
    told = []
    rows = table(model, chosen, judge(model, harm), LENGTH, lambda done, of: told.append((done, of)))
    flipped = {row.name: (row.alone.changed_labels, row.spared.changed_labels) for row in rows}
    assert flipped == {"layer 0": (21, 5), "layer 1": (5, 21), "ffn-up": (6, 20), "ffn-down": (20, 6)}
    assert rows[0].alone.accuracy_drop == pytest.approx(0.21)
    assert 0 < rows[1].alone.divergence < rows[0].alone.divergence
    assert rows[0].work + rows[1].work == pytest.approx(share_of_work(model.config, chosen, LENGTH))
    assert told == [(done, 8) for done in range(8)]


def steps(model, chosen, harm, max_drop):
    found = search(model, chosen, (judge(model, harm), judge(model, harm)), LENGTH, max_drop, lambda done, of: None)
    return [({unit for unit in chosen if unit not in step.quantized}, step) for step in found]


def test_what_harms_most_is_taken_back_first_until_the_budget_holds(model, chosen, harm):
    up0, down0, up1, _ = chosen
    found = steps(model, chosen, harm, 0.02)
    assert [spared for spared, _ in found] == [set(), {down0}, {down0, up1}]
    assert [step.cost.changed_labels for _, step in found] == [26, 6, 1]
    work = [step.work for _, step in found]
    assert work == sorted(work, reverse=True)
    assert len(steps(model, chosen, harm, 0.3)) == 1, "a budget for all of it takes nothing back"
    assert found[-1][1].quantized[0].layer in (0, 1)
    assert up0 in found[-1][1].quantized


def test_the_search_ends_where_nothing_is_left(model, chosen, harm):
    found = steps(model, chosen, harm, -1.0)
    assert [len(step.quantized) for _, step in found] == [4, 3, 2, 1, 0]
    assert found[-1][1].work == 0


def test_work_of_a_unit_by_hand(model):
    config = model.config  # 16 wide, feed-forward 24
    assert Unit(0, "qkv").work(config, LENGTH) == 3 * 16 * 16
    assert Unit(0, "ffn-down").work(config, LENGTH) == 16 * 24
    assert Unit(0, "attention-products").work(config, LENGTH) == 2 * 16 * 20
    assert share_of_work(config, units(config, "attention"), LENGTH) == pytest.approx(1)
