"""Asks from many sides through the threads of a real engine, told apart by the content of their answers."""

import math
import threading
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

import numpy as np
import pytest
import torch

from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.engines.pytorch import PyTorchEngine
from bertforge.engines.run import run
from bertforge.errors import UsageError
from bertforge.hardware import Hardware
from bertforge.serving.batcher import Batcher, Lane
from bertforge.serving.channel import Answer, Ask, Refusal
from bertforge.serving.settings import Pace
from tests.model.tiny import tiny_bert

SEP, LONGEST = 3, 20
HERE = Hardware(torch.device("cpu"), "a CPU", 1.0, 2, bf16=False)
DEFAULTS = Pace(queue=math.inf)
CLOSE = 1e-5  # float32, summed in other orders


@pytest.fixture(scope="module")
def model():
    return tiny_bert(labels=("a", "b", "c"))


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    return [random.integers(4, 50, length).astype(np.int32) for length in random.integers(4, 26, 300)]


@pytest.fixture(scope="module")
def logits(model, texts):
    """Of each text, `[texts, labels]`."""
    offsets = np.cumsum([0, *map(len, texts)])
    examples = Examples(TokenStore(np.concatenate(texts).astype(np.uint32), offsets), np.full(300, -1), SEP, LONGEST)
    return run(PyTorchEngine(model, HERE, "fp32"), examples, np.arange(300))


class Held(PyTorchEngine):
    """Computes when it may, on as many streams as asked for, and says what it was asked."""

    def __init__(self, model, *, packed=True, streams=2, held=False):
        super().__init__(model, HERE, "fp32", packed=packed)
        self.streams, self.may, self.begun, self.rows = streams, threading.Event(), threading.Event(), []
        self.fails_over = None
        if not held:
            self.may.set()

    def logits(self, batch):
        self.begun.set()
        assert self.may.wait(60)
        self.rows.append(len(batch.input_ids) if not self.packed else len(batch))
        if self.fails_over is not None:
            self.fails_over(self.rows[-1])
        return super().logits(batch)


class Service:
    """A batcher, and what it says of each ask."""

    def __init__(self, *engines, pace=DEFAULTS):
        self.broken = []
        lanes = {f"lane {number}": Lane(engine, SEP, LONGEST) for number, engine in enumerate(engines)}
        self.batcher = Batcher(lanes, pace, self._deliver, self.broken.append)
        self.said = {}  # number of an ask -> the messages it got
        self.lock = threading.Lock()

    def _deliver(self, sent):
        for reply, message in sent:
            reply(message)

    def ask(self, number, texts, client="c", lane="lane 0", **more):
        """A future of the first message, and the request."""
        first = Future()

        def reply(message):
            with self.lock:
                self.said.setdefault(number, []).append(message)
            if not first.done():
                first.set_result(message)

        ids, lengths = np.concatenate(texts), np.array([len(text) for text in texts], np.int32)
        return first, self.batcher.submit(Ask(number, "m", "g", client, ids, lengths, **more), lane, reply)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for lane in self.batcher.lanes.values():
            lane.engine.may.set()
        self.batcher.close()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_every_ask_gets_its_own_rows_once_whoever_asks_beside_it(model, texts, logits, packed):
    assert np.abs(logits[:, None] - logits[None]).max(2)[~np.eye(300, dtype=bool)].min() > 2 * CLOSE  # all differ
    threads, each = range(4), 500
    asked = {}

    def client(service, name, random):
        for turn in range(each):
            number = name * each + turn
            rows = random.integers(0, 300, 1 if turn % 10 else 17)
            asked[number] = rows, service.ask(number, [texts[row] for row in rows], client=f"c{name % 3}")[0]

    with Service(Held(model, packed=packed)) as service:
        senders = [
            threading.Thread(target=client, args=(service, name, np.random.default_rng(name))) for name in threads
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        wait_for([first for _, first in asked.values()], 120)
    assert len(asked) == 4 * each
    for number, (rows, first) in asked.items():
        assert len(service.said[number]) == 1
        answer = first.result(0)
        assert isinstance(answer, Answer)
        assert answer.number == number
        assert np.abs(answer.logits - logits[rows]).max() < CLOSE
    load = service.batcher.load("m")
    assert (load.rows, load.waiting) == (4 * (each * 9 // 10 + each // 10 * 17), 0)
    assert load.batches < load.rows  # some went together


def test_rows_of_several_lanes_are_computed_by_their_own_models(texts, logits, model):
    other = tiny_bert(seed=1, labels=("x", "y"))
    with Service(Held(model, streams=1), Held(other, streams=1)) as service:
        asks = [service.ask(number, [texts[number]], lane=f"lane {number % 2}")[0] for number in range(300)]
        found = [ask.result(60).logits for ask in asks]
    assert [one.shape for one in found[:2]] == [(1, 3), (1, 2)]
    assert np.abs(np.concatenate(found[::2]) - logits[::2]).max() < CLOSE


def test_the_rows_of_one_ask_are_computed_on_all_streams(model, texts):
    """Two batches are under way at once, or this waits for ever."""
    engine, both, honest = Held(model), threading.Barrier(2), PyTorchEngine.logits
    engine.logits = lambda batch: (both.wait(60), honest(engine, batch))[1]
    with Service(engine, pace=Pace(latency=1e-9)) as service:
        service.batcher._note(1, 1, 1.0)  # the rate is known, so a batch is as large as the longest text
        answer = service.ask(0, [np.full(LONGEST, 5, np.int32)] * 8)[0].result(120)
        assert isinstance(answer, Answer)


def test_who_cancels_is_not_computed_and_not_answered(model, texts):
    engine = Held(model, streams=1, held=True)
    with Service(engine) as service:
        first, _ = service.ask(0, [texts[0]])
        assert engine.begun.wait(60)
        _, gone = service.ask(1, texts[:5])
        last, _ = service.ask(2, [texts[2]])
        service.batcher.cancel(gone)
        engine.may.set()
        assert isinstance(first.result(60), Answer)
        assert isinstance(last.result(60), Answer)
    assert engine.rows == [1, 1]
    assert 1 not in service.said


def test_one_that_is_cancelled_while_it_is_computed_is_not_answered(model, texts):
    engine = Held(model, streams=1, held=True)
    with Service(engine) as service:
        _, gone = service.ask(1, texts[:5])
        assert engine.begun.wait(60)
        service.batcher.cancel(gone)
        engine.may.set()
        assert isinstance(service.ask(2, [texts[2]])[0].result(60), Answer)
    assert engine.rows[0] == 5
    assert 1 not in service.said


def test_what_is_too_late_is_refused_without_being_computed(model, texts):
    engine = Held(model, streams=1)
    with Service(engine) as service:
        refusal = service.ask(0, [texts[0]], deadline=0.0)[0].result(60)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "deadline"
    assert engine.rows == []


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(model, texts):
    engine = Held(model, streams=1)
    with Service(engine, pace=Pace(queue=1e-9)) as service:
        assert isinstance(service.ask(0, [texts[0]])[0].result(60), Answer)  # now the rate is known
        engine.may.clear()
        engine.begun.clear()
        service.ask(1, [texts[1]])
        assert engine.begun.wait(60)
        waiting, _ = service.ask(2, texts[:9])
        refusal, nothing = service.ask(3, [texts[3]])
        other, _ = service.ask(4, [texts[4]], client="another")
        refusal = refusal.result(0)
        assert nothing is None
        assert (refusal.reason, refusal.number) == ("full", 3)
        load = service.batcher.load("m")
        costs = [min(len(text), LONGEST) for text in texts]
        assert load.waiting == sum(costs[:9]) + costs[4]
        assert refusal.retry_after == pytest.approx(sum(costs[:9]) / load.rate)
        engine.may.set()
        assert isinstance(waiting.result(60), Answer)
        assert isinstance(other.result(60), Answer)


def test_a_batch_that_does_not_fit_into_memory_is_computed_in_parts(model, texts, logits):
    def fails_over(rows):
        if rows > 3:
            raise MemoryError

    engine = Held(model, streams=1)
    engine.fails_over = fails_over
    with Service(engine) as service:
        answer = service.ask(0, texts[:16])[0].result(60)
        assert np.abs(answer.logits - logits[:16]).max() < CLOSE
        asked = len(engine.rows)
        service.ask(1, texts[:16])[0].result(60)
        assert max(engine.rows[asked:]) < 16  # it was learnt
    assert service.broken == []


def test_an_engine_that_fails_is_told_and_refuses_what_it_failed_over(model, texts):
    def fails_over(rows):
        raise RuntimeError("device-side assert")

    engine = Held(model, streams=1)
    engine.fails_over = fails_over
    with Service(engine) as service:
        refusal = service.ask(0, texts[:3])[0].result(60)
        assert refusal.reason == "failed"
        assert "assert" not in refusal.message  # what a library says is for the log
    assert [str(error) for error in service.broken] == ["device-side assert"]
    assert len(service.said[0]) == 1


def test_a_row_that_an_engine_does_not_take_spoils_no_other(model, texts, logits):
    engine = Held(model, streams=1, held=True)
    bad, honest = 2, engine.logits  # no text has this token

    def refuses(batch):
        found = honest(batch)
        if (np.asarray(batch.input_ids) == bad).any():
            raise UsageError("a token that the model does not take")
        return found

    engine.logits = refuses
    with Service(engine) as service:
        service.ask(0, texts[:1])
        assert engine.begun.wait(60)
        spoilt, _ = service.ask(1, [texts[1], np.array([7, bad, 8], np.int32), texts[2]], client="a")
        others = [service.ask(number, [texts[number]], client="b")[0] for number in range(2, 12)]
        engine.may.set()
        assert spoilt.result(60).reason == "failed"
        assert all(isinstance(other.result(60), Answer) for other in others)
        assert max(engine.rows) > 2, "they went together"
    assert service.broken == []
    assert len(service.said[1]) == 1


def test_a_rate_that_was_measured_while_kernels_were_made_is_mended_by_short_requests(model, texts):
    """The clock is moved: the first call takes a hundred times as long as the others, for each token."""
    engine = Held(model, streams=1)
    with Service(engine) as service:
        service.batcher._note(1, 60, 0.6)
        assert service.batcher.load("m").rate == pytest.approx(100)
        for _ in range(100):
            service.batcher._note(1, 60, 0.006)
        assert service.batcher.load("m").rate == pytest.approx(10_000, rel=0.01)
        service.batcher._note(1, 1, 1.0)  # a small batch may be slow for its size
        assert service.batcher.load("m").rate == pytest.approx(10_000, rel=0.01)


def test_after_a_while_larger_batches_are_tried_again(model, texts, monkeypatch):
    def fails_over(rows):
        if rows > 3:
            raise MemoryError

    engine = Held(model, streams=1)
    engine.fails_over = fails_over
    with Service(engine, pace=Pace(latency=math.inf)) as service:
        service.ask(0, texts[:16])[0].result(60)
        engine.fails_over, asked = None, len(engine.rows)
        monkeypatch.setattr("bertforge.serving.batcher._FULL", 0.0)
        for number in range(1, 20):
            service.ask(number, texts[:16])[0].result(60)
        assert max(engine.rows[asked:]) == 16


def test_batches_are_as_large_as_the_latency_and_the_longest_text_allow(model, texts):
    with Service(Held(model, streams=1), pace=Pace(latency=1e-9)) as service:
        service.ask(0, [texts[0]])[0].result(60)  # now the rate is known
        service.ask(1, [text[:5] for text in texts[:20]])[0].result(60)
        assert service.batcher.lanes["lane 0"].engine.rows == [1, *[LONGEST // 5] * 5]  # as much as the longest text
    with Service(Held(model, streams=1), pace=Pace(latency=1e9)) as service:
        service.ask(0, [texts[0]])[0].result(60)
        service.ask(1, texts[:20])[0].result(60)
        assert service.batcher.lanes["lane 0"].engine.rows == [1, 20]
