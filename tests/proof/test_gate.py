"""What is shown, what is not shown, and what the rows cannot tell."""

import numpy as np
import pytest

from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.engines.base import Rows
from bertforge.proof import gate
from bertforge.proof.gate import Loss, PrecisionError, Reference, Shift, prove
from bertforge.proof.golden import GoldenRows
from bertforge.proof.tolerances import SHIFT_RATIO
from tests.engines.building import built
from tests.model.tiny import tiny_bert


def right(rows, wrong):
    found = np.ones(rows, bool)
    found[:wrong] = False
    return found


def test_two_rows_of_500_show_nothing():
    loss = Loss.of(right(500, 0), right(500, 2))
    assert loss.value == pytest.approx(0.004), "more than is allowed, as a point"
    assert loss.low < 0.003 < loss.high
    assert loss.holds
    assert not loss.decided
    assert "cannot tell whether more than 0.3 points are lost" in str(loss)


def test_twenty_rows_of_500_show_that_accuracy_is_lost():
    loss = Loss.of(right(500, 0), right(500, 20))
    assert loss.low > 0.003
    assert loss.decided
    assert not loss.holds


def test_rows_that_gain_and_lose_alike_lose_nothing():
    model, engine = np.ones(4000, bool), np.ones(4000, bool)
    model[:20], engine[20:40] = False, False
    loss = Loss.of(model, engine)
    assert loss.value == 0
    assert loss.holds


def test_rows_that_all_agree_leave_a_doubt_that_more_rows_take_away():
    few, many = (Loss.of(np.ones(rows, bool), np.ones(rows, bool)) for rows in (100, 5000))
    assert few.high > 0.003 > many.high
    assert not few.decided
    assert many.decided
    assert "+0.00 points" in str(many)


def test_the_interval_covers_as_often_as_it_says():
    """Of 1,000 engines that lose 1% and change 3% of the labels, on 400 rows each."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        draw = rng.random(400)
        loss = Loss.of(draw > 0.01, (draw <= 0.01) | (draw > 0.03))
        held += loss.low <= 0.01 <= loss.high
    assert 930 <= held <= 990


def test_a_shift_is_judged_by_what_the_precision_does():
    rng = np.random.default_rng(0)
    simulated = rng.gamma(2.0, 0.01, 300)
    assert Shift.of(rng.permutation(simulated), simulated).decided
    assert Shift.of(rng.permutation(simulated), simulated).holds
    beyond = Shift.of(2 * SHIFT_RATIO * simulated, simulated)
    assert beyond.decided
    assert not beyond.holds
    assert not Shift.of(np.full(300, np.nan), simulated).holds
    assert Shift.of(np.full(300, 5e-5), np.zeros(300)).holds, "a ten-thousandth decides nothing"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model, its golden rows, 2,000 rows whose labels it gets right nine times in ten, and an engine of it."""
    model = tiny_bert(vocab_size=100, max_position_embeddings=64)
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, size=2000)
    store = TokenStore(rng.integers(5, 90, size=lengths.sum()).astype(np.uint16), np.r_[0, np.cumsum(lengths)])
    examples = Examples(store, np.zeros(2000, np.int64), 3, 48)
    golden = GoldenRows.record(model, examples, np.arange(16))
    reference = Reference(model, golden, "fp32", "fp32")
    labels = reference.logits(examples, np.arange(2000)).argmax(1)
    labels[rng.random(2000) < 0.1] ^= 1
    examples = Examples(store, labels, 3, 48)
    engine = built("onnxruntime", model, tmp_path_factory.mktemp("engine"))
    return reference, engine, Rows(examples, np.arange(2000))


def test_more_rows_are_asked_until_they_tell(setting, monkeypatch):
    reference, engine, rows = setting
    said = []
    proof = prove(reference, engine, None, rows, said.append)
    assert said == []
    assert proof["accuracy_loss"]["rows"] == 1000
    assert proof["told"] == "1,000 validation rows: +0.00 points (-0.20 to +0.20)"
    monkeypatch.setattr(gate, "FIRST_ROWS", 100)
    assert prove(reference, engine, None, rows, said.append)["accuracy_loss"]["rows"] == 1600
    assert said == [
        "100 validation rows cannot tell whether accuracy is lost; asking 400",
        "400 validation rows cannot tell whether accuracy is lost; asking 1,600",
    ]
    late = prove(reference, engine, None, rows, said.append, until=0.0)
    assert late["accuracy_loss"]["rows"] == 100, "no time is left to ask more"
    few = Rows(rows.examples, rows.rows[:100])
    assert "cannot tell" in prove(reference, engine, None, few, said.append)["told"]


def test_accuracy_that_is_lost_is_refused_though_probabilities_hardly_move(setting, monkeypatch):
    """Rows near the edge between two labels fall to the wrong side, all of them."""
    reference, engine, rows = setting
    plain = reference.logits(rows.examples, rows.rows)
    monkeypatch.setattr(gate, "SHIFT_FLOOR", 1.0)  # as if the precision moved as much
    monkeypatch.setattr(gate, "WORST_FLOOR", 1.0)
    monkeypatch.setattr(gate, "CHANGED_LABELS", 1.0)

    def wrong(engine, examples, asked, **shape):
        found = reference.logits(examples, asked)
        if len(asked) < 100:
            return found
        edge = np.quantile(np.abs(plain[:, 1] - plain[:, 0]), 0.04)
        near = np.abs(found[:, 1] - found[:, 0]) < edge
        hit = near & (found.argmax(1) == examples.labels[asked])
        found[hit] = found[hit][:, ::-1]
        return found

    monkeypatch.setattr(gate, "run", wrong)
    with pytest.raises(PrecisionError, match=r"in fp32 loses accuracy on 1,000 validation rows: -\d\.\d\d points \("):
        prove(reference, engine, None, rows, lambda text: None)
