"""Edges cost the least time that any edges could, and buckets keep to their budget."""

from itertools import combinations

import numpy as np
import pytest

from bertforge.engines.base import BatchShape
from bertforge.engines.buckets import Bucket, buckets_of, choose_edges, usual_edges, waste


def expected_time(lengths, edges, hidden):
    padded = np.array([min(edge for edge in edges if edge >= length) for length in lengths])
    return (padded * (1 + padded / (6 * hidden))).sum()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("hidden", [8, 384])
@pytest.mark.parametrize("longest", [100, 128])
def test_no_other_edges_are_faster(count, hidden, longest):
    lengths = np.random.default_rng(count).gamma(2, 20, size=300).astype(int).clip(2, longest)
    found = choose_edges(lengths, longest, hidden, count)
    candidates = list(range(16, longest, 16))
    others = [(*some, longest) for k in range(count) for some in combinations(candidates, k)]
    best = min(expected_time(lengths, edges, hidden) for edges in others)
    assert expected_time(lengths, found, hidden) == pytest.approx(best)
    assert len(found) <= count
    assert found[-1] == longest
    assert list(found) == sorted(set(found))


def test_real_lengths_decide():
    short, long = np.full(1000, 30), np.full(1000, 250)
    assert choose_edges(short, 512, 384) == (32, 512), "edges that no row needs are left out"
    assert choose_edges(long, 512, 384) == (256, 512)
    assert choose_edges(np.concatenate([short, long]), 512, 384) == (32, 256, 512)
    assert choose_edges(np.array([512]), 512, 384) == (512,)
    assert choose_edges(np.array([7]), 10, 384) == (10,), "never past the longest text, a multiple or not"


def test_attention_pulls_edges_up():
    """Where attention weighs more, padding a long row costs more than padding a short one."""
    lengths = np.repeat(np.arange(1, 513), 3)
    light, heavy = (choose_edges(lengths, 512, hidden, 3) for hidden in (10_000, 8))
    assert sum(heavy) > sum(light)


def test_the_usual_edges_stop_at_the_longest_text():
    assert usual_edges(512) == (64, 128, 256, 512)
    assert usual_edges(200) == (64, 128, 200)
    assert usual_edges(48) == (48,)


def test_buckets_fill_the_budget_and_hold_a_single_row():
    assert buckets_of((64, 512), tokens=1000) == (Bucket(1, 512), Bucket(15, 64), Bucket(1, 64))
    for bucket in buckets_of((48, 100, 512), tokens=4096):
        assert bucket.rows == 1 or 4096 - bucket.length < bucket.rows * bucket.length <= 4096


def test_waste_by_hand():
    assert waste(np.array([3, 4, 5]), (4, 8)) == pytest.approx((4 + 4 + 8) / 12 - 1)
    assert waste(np.array([4, 8]), (4, 8)) == 0


def test_a_shape_pads_to_its_edges_or_else_to_its_multiple():
    edges = BatchShape(tokens=1, multiple=8, edges=(10, 20))
    assert [edges.padded(length) for length in (1, 10, 11, 20, 21)] == [10, 10, 20, 20, 24]
    assert BatchShape(tokens=1, multiple=16).padded(17) == 32
