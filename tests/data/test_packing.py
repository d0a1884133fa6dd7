"""Every row in exactly one pack, in order, under the budget."""

import numpy as np
import pytest

from bertforge.data.packing import packs, shares
from bertforge.errors import UsageError


def test_the_modules_example():
    assert packs(np.array([3, 4, 2, 8, 1]), 8) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_once_in_order_and_no_pack_could_take_the_next_row(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, size=500)
    found = packs(lengths, 100)
    assert np.concatenate([np.arange(500)[part] for part in found]).tolist() == list(range(500))
    sums = [int(lengths[part].sum()) for part in found]
    assert max(sums) <= 100
    for part, used in zip(found[:-1], sums[:-1], strict=True):
        assert used + lengths[part.stop] > 100, "a pack was closed too early"


def test_the_last_partial_pack_is_kept():
    assert packs(np.array([5, 5, 1]), 10)[-1] == slice(2, 3)


def test_a_row_that_fills_a_pack_exactly_is_no_error():
    assert packs(np.array([10]), 10) == [slice(0, 1)]


def test_a_row_above_the_budget_names_the_setting():
    with pytest.raises(UsageError, match=r"a row has 11 tokens, but a pack holds 10; raise tokens_per_step to 11"):
        packs(np.array([5, 11, 3]), 10)


def test_no_rows_no_packs():
    assert packs(np.array([], dtype=np.int64), 10) == []


def test_shares_by_hand():
    # By length: places 1, 3, 0, 4, 2, dealt to hands 0, 1, 1, 0, 0.
    assert [share.tolist() for share in shares(np.array([5, 9, 1, 7, 3]), 2)] == [[1, 2, 4], [0, 3]]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_row_is_in_one_share_in_order_and_shares_cost_the_same(count):
    lengths = np.random.default_rng(0).integers(3, 512, size=300)
    found = shares(lengths, count)
    assert len(found) == count
    assert all(share.tolist() == sorted(share) for share in found)
    assert sorted(np.concatenate(found)) == list(range(300))
    tokens = [int(lengths[share].sum()) for share in found]
    assert max(tokens) - min(tokens) < 0.02 * lengths.sum() / count
    in_file_order = [int(lengths[part].sum()) for part in np.array_split(np.arange(300), count)]
    assert count == 1 or max(in_file_order) > max(tokens), "dealing by length is what balances them"


def test_fewer_rows_than_hands_leave_hands_empty():
    assert [share.tolist() for share in shares(np.array([4]), 3)] == [[0], [], []]
    assert [len(share) for share in shares(np.array([], dtype=np.int64), 2)] == [0, 0]


def test_a_pack_holds_no_more_rows_than_it_may() -> None:
    assert packs(np.array([1, 1, 1, 7, 1, 1]), 8, most_rows=2) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    found = packs(lengths, 100, most_rows=4)
    sizes = [(len(lengths[part]), int(lengths[part].sum())) for part in found]
    assert max(rows for rows, _ in sizes) == 4
    assert 92 < max(tokens for _, tokens in sizes) <= 100, "both limits are met somewhere"
    assert [row for part in found for row in range(part.start, part.stop)] == list(range(500))
