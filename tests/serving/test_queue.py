"""Whose turn it is, by the order and the content of what is taken."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bertforge.engines.base import BatchShape
from bertforge.serving.channel import Ask
from bertforge.serving.queue import Queue, Request

PACKS, PADS = BatchShape(tokens=100), BatchShape(tokens=100, multiple=10)


def request(queue, client, lengths, lane="", **more):
    ask = Ask(0, "m", "g", client, np.zeros(sum(lengths), np.int32), np.array(lengths, np.int32), **more)
    costs = queue.costs(lengths)
    made = Request(ask, lane, print, 0.0, np.cumsum([0, *lengths]), costs, waiting=len(lengths), tokens=sum(costs))
    queue.put(made)
    return made


def taken(queue, most=100, now=0.0):
    """Client and length of each row of the next batch."""
    rows, _ = queue.take(most, now)
    return [(made.ask.client, int(made.ask.lengths[row])) for made, row in rows]


def tokens_until_empty(queue, stop, most=100):
    """Tokens that each client was given by when `stop` had nothing left."""
    given = Counter()
    while stop.waiting:
        for client, length in taken(queue, most):
            given[client] += length
    return given


def test_a_single_row_goes_with_the_next_pack_however_much_waits():
    queue = Queue(PACKS, packed=True)
    request(queue, "many", [10] * 1000)
    assert taken(queue) == [("many", 10)] * 10
    request(queue, "one", [10])
    assert ("one", 10) in taken(queue)
    request(queue, "one", [10])  # it comes back, and has saved up nothing to wait for
    assert ("one", 10) in taken(queue)


def test_who_comes_is_served_before_who_was_just_served():
    queue = Queue(PADS, packed=False)
    request(queue, "many", [50] * 100)
    for _ in range(3):
        assert taken(queue) == [("many", 50)] * 2
    request(queue, "one", [10])  # of another length, so it cannot go along
    assert taken(queue) == [("one", 10)]


def test_clients_get_the_same_tokens_however_long_their_rows_are():
    queue = Queue(PACKS, packed=True)
    short, long = request(queue, "short", [2] * 3000), request(queue, "long", [40] * 150)
    given = tokens_until_empty(queue, long)
    assert short.waiting < 60  # both end together, for both had 6,000 tokens
    assert given["long"] == 6000


@pytest.mark.parametrize("packed", [True, False])
def test_who_comes_back_again_and_again_gets_no_more_than_who_waits(packed):
    queue = Queue(PADS if not packed else PACKS, packed)
    steady = request(queue, "steady", [50] * 60)
    given = Counter()
    request(queue, "again", [50])
    while steady.waiting:
        batch = taken(queue, most=50)
        given.update(batch)
        if ("again", 50) in batch:
            request(queue, "again", [50])
    assert abs(given["again", 50] - given["steady", 50]) <= 1


def test_who_comes_later_is_given_nothing_for_the_time_before():
    queue = Queue(PACKS, packed=True)
    request(queue, "early", [10] * 1000)
    for _ in range(50):
        taken(queue)
    request(queue, "late", [10] * 1000)
    for _ in range(10):
        clients = Counter(client for client, _ in taken(queue))
        assert clients == {"early": 5, "late": 5}


def test_rows_of_one_client_are_taken_in_their_order():
    queue = Queue(PACKS, packed=True)
    lengths = [30, 50, 40, 20, 60, 10]
    request(queue, "a", lengths)
    found = []
    while batch := taken(queue):
        assert sum(length for _, length in batch) <= 100
        found += [length for _, length in batch]
    assert found == lengths


def test_a_row_that_is_longer_than_a_batch_goes_alone():
    queue = Queue(PACKS, packed=True)
    request(queue, "a", [300, 10])
    assert taken(queue) == [("a", 300)]
    assert taken(queue) == [("a", 10)]


def test_an_engine_that_pads_gets_rows_of_like_length_the_oldest_first():
    queue = Queue(PADS, packed=False)
    request(queue, "a", [42, 11, 49, 12, 48, 45, 13])
    assert taken(queue) == [("a", 42), ("a", 49)]  # 50 tokens each
    assert taken(queue) == [("a", 11), ("a", 12), ("a", 13)]  # the oldest that is left, and its like
    assert taken(queue) == [("a", 48), ("a", 45)]


def test_hardly_shorter_rows_fill_a_batch_and_much_shorter_ones_do_not():
    queue = Queue(PADS, packed=False)
    request(queue, "a", [25, 15, 5])
    assert taken(queue) == [("a", 25), ("a", 15)]
    assert taken(queue) == [("a", 5)]


def test_rows_that_went_along_early_are_not_given_again():
    queue = Queue(PADS, packed=False)
    first, second = request(queue, "a", [40, 10, 40] * 20), request(queue, "b", [40] * 40)
    found = Counter()
    while batch := queue.take(80, 0.0)[0]:
        found.update((id(made), row) for made, row in batch)
    assert set(found.values()) == {1}
    assert len(found) == 100
    assert (first.waiting, second.waiting, queue.tokens) == (0, 0, 0)


def test_a_batch_is_of_one_lane_and_no_lane_starves():
    queue = Queue(PACKS, packed=True)
    for name in ("a", "b", "c"):
        request(queue, name, [10] * 30, lane=name)
    seen = []
    while rows := queue.take(100, 0.0)[0]:
        (lane,) = {made.lane for made, _ in rows}
        seen.append(lane)
    assert sorted(seen[:3]) == sorted(seen[3:6]) == ["a", "b", "c"]


def test_no_more_rows_than_the_engine_takes():
    queue = Queue(replace(PACKS, rows=3), packed=True)
    request(queue, "a", [1] * 5)
    assert len(taken(queue)) == 3


def test_what_is_dropped_is_not_taken_and_no_longer_counts():
    queue = Queue(PACKS, packed=True)
    gone, kept = request(queue, "a", [10] * 5), request(queue, "a", [20])
    queue.drop(gone)
    assert queue.tokens == 20
    assert taken(queue) == [("a", 20)]
    queue.drop(kept)  # all of it was taken already
    assert queue.tokens == 0
    assert taken(queue) == []


def test_what_is_too_late_is_told_and_not_computed():
    queue = Queue(PACKS, packed=True)
    late, kept = request(queue, "a", [10] * 5, deadline=3.0), request(queue, "b", [10], deadline=4.0)
    rows, told = queue.take(100, 3.0)
    assert rows == [(kept, 0)]
    assert told == [late]
    assert (late.over, kept.over, queue.tokens) == (True, False, 0)
    request(queue, "a", [10], deadline=math.inf)
    assert taken(queue, now=1e9) == [("a", 10)]


def test_a_full_queue_still_has_each_clients_part():
    queue = Queue(PACKS, packed=True)
    request(queue, "many", [10] * 20)
    assert not queue.full("many", 201)
    assert queue.full("many", 200)
    assert not queue.full("one", 200)
    request(queue, "one", [50, 50])
    assert queue.full("one", 200)  # half of it is its part, now that two wait
    assert not queue.full("two", 200)
