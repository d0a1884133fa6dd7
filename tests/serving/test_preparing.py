import asyncio
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bertforge.data.schema import QUESTIONS
from bertforge.errors import DataError
from bertforge.inference.codec import Codec
from bertforge.manifest import served
from bertforge.serving.inputs import Columns, read_inputs
from bertforge.serving.preparing import Preparation
from bertforge.serving.settings import Limits
from tests.runs import made_up


@pytest.fixture(scope="module")
def text(runs):
    return Codec.load(*served(runs["full"]))


@pytest.fixture(scope="module")
def columns(runs):
    return Codec.load(*served(runs["columns"]))


def together(codec, requests):
    """What is made of requests that come at the same time."""

    async def run():
        prepare = Preparation(codec)
        return await asyncio.gather(*map(prepare, requests), return_exceptions=True)

    return asyncio.run(run())


def equal(codec, prepared, given):
    """Whether rows were prepared as `Predictor.predict` prepares them."""
    ids, offsets = codec.tokenizer.encode(given.texts)
    assert prepared.texts == given.texts
    np.testing.assert_array_equal(prepared.ids, ids)
    np.testing.assert_array_equal(prepared.lengths, np.diff(offsets))
    for name, array in (codec.arrays(given.columns) or {}).items():
        width = array.shape[1]
        np.testing.assert_array_equal(prepared.columns[name][:, :width], array)
        assert not prepared.columns[name][:, width:].any(), "zeros, where rows beside these have more names"


def test_each_request_gets_its_own_rows_however_many_are_prepared_together(text):
    requests = [[f"request {number}, text {row}" for row in range(rows)] for number, rows in enumerate((1, 200, 3, 70))]
    for prepared, rows in zip(together(text, requests), requests, strict=True):
        equal(text, prepared, text.read(rows))


def test_rows_of_columns_mean_the_same_beside_any_others(columns):
    frame = made_up(90)[list(QUESTIONS.required_columns)]
    known, rows = Columns.of(columns), frame.to_dict("records")
    requests = [[row] for row in rows[:5]] + [rows[5:]]
    found = together(columns, [read_inputs(request, known, Limits()) for request in requests])
    for prepared, request in zip(found, requests, strict=True):
        equal(columns, prepared, columns.read(pd.DataFrame(request)))


def test_tokens_that_are_cut_are_counted(text):
    (prepared,) = together(text, [["word", "word " * 3000, "", "Größe, 東京! " * 400]])
    assert prepared.lengths.tolist() == [3, 512, 2, 512]
    alone = [text.tokenizer.count(one) for one in prepared.texts]
    assert prepared.whole.tolist() == alone
    assert prepared.whole[1] == 3002


class Counting:
    """A tokenizer that keeps how many texts it was given at a time."""

    def __init__(self, tokenizer):
        self.tokenizer, self.batches, self.texts = tokenizer, [], []

    def encode(self, texts):
        self.batches.append(len(texts))
        self.texts.append(texts)
        return self.tokenizer.encode(texts)


def test_requests_of_many_rows_let_another_pass(text):
    counting = Counting(text.tokenizer)

    async def run():
        prepare = Preparation(replace(text, tokenizer=counting))
        many = [asyncio.create_task(prepare(["text"] * 500)) for _ in range(8)]
        await asyncio.gather(*many, prepare(["another"]))  # they come first

    asyncio.run(run())
    assert any("another" in texts for texts in counting.texts[:3]), "each of the eight gave up a part of its turn"
    assert sum(counting.batches) == 4001
    assert max(counting.batches) <= 64, "of the event loop's time"


def test_clients_take_turns_whoever_has_more_requests(text):
    order = []

    async def run():
        prepare = Preparation(text)

        async def asked(client):
            await prepare(["text"] * 10, client)
            order.append(client)

        many = [asked("many") for _ in range(100)]
        await asyncio.gather(*many, *(asked(name) for name in ("one", "other")))

    asyncio.run(run())
    assert {*order[:8]} == {"many", "one", "other"}, "in the first turn, though all of the others' came before"


@pytest.mark.parametrize(("requests", "rows"), [(4, 1024), (256, 1)])
def test_a_full_line_lets_in_a_client_that_has_less_than_its_part(text, requests, rows):
    async def run():
        prepare, seen = Preparation(text), []

        async def look():
            seen.append((prepare.full("many"), prepare.full("other")))

        line = [prepare(["text"] * rows, "many") for _ in range(requests)]
        await asyncio.gather(*line[:-1], look(), line[-1], look())
        await look()
        return seen

    assert asyncio.run(run()) == [(False, False), (True, False), (False, False)]


def test_a_request_is_not_prepared_once_its_deadline_is_over(text):
    counting = Counting(text.tokenizer)

    async def run():
        prepare = Preparation(replace(text, tokenizer=counting))
        over = time.monotonic() - 1
        return await asyncio.gather(prepare(["late"] * 500, "a", over), prepare(["b"], "b"), return_exceptions=True)

    late, other = asyncio.run(run())
    assert (late.status, other.texts) == (504, ["b"])
    assert counting.batches == [1]


class Breaking:
    """A tokenizer with a defect."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, texts):
        if "break" in texts:
            raise DataError("a defect")
        return self.tokenizer.encode(texts)


def test_a_request_whose_rows_cannot_be_read_fails_alone(text):
    broken = replace(text, tokenizer=Breaking(text.tokenizer))
    good, bad, same = together(broken, [["one"], ["two", "break"], ["three"]])
    assert isinstance(bad, DataError)
    assert (good.texts, same.texts) == (["one"], ["three"])


def test_a_request_that_nobody_waits_for_is_left_out(text):
    counting = Counting(text.tokenizer)

    async def run():
        prepare = Preparation(replace(text, tokenizer=counting))
        gone = asyncio.create_task(prepare(["text"] * 1000))
        await asyncio.sleep(0)
        gone.cancel()
        return await prepare(["another"])

    assert asyncio.run(run()).texts == ["another"]
    assert sum(counting.batches) <= 65, "what was begun, and the other"
