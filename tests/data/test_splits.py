from __future__ import annotations

import numpy as np
import pytest

from bertforge.data.splits import Groups, hash_texts, split_at_random, split_by_time

RNG = np.random.default_rng(0)
TEXTS = [f"Text  {RNG.integers(600)}" for _ in range(1000)]  # about 480 different ones
LABELS = RNG.integers(0, 3, size=1000)
DATES = np.datetime64("2010-01-01", "s") + RNG.permutation(1000).astype("timedelta64[D]")


def test_texts_are_compared_without_case_and_white_space() -> None:
    same = hash_texts(["A  b\n", "a B"])
    assert same[0] == same[1]
    assert same[0] != hash_texts(["ab"])[0]


def test_groups_are_numbered_by_appearance() -> None:
    groups = Groups.from_hashes(hash_texts(["b", "a", "b", "c", "A"]))
    assert groups.of_row.tolist() == [0, 1, 0, 2, 1]
    assert groups.first_row.tolist() == [0, 1, 3]
    assert groups.size.tolist() == [2, 2, 1]
    assert groups.count_conflicts(np.array([0, 1, 1, 0, 1])) == 1


@pytest.mark.parametrize("by", ["random", "time"])
def test_duplicates_never_straddle(by: str) -> None:
    groups = Groups.from_hashes(hash_texts(TEXTS))
    part = split_at_random(groups, LABELS, 42) if by == "random" else split_by_time(groups, DATES)
    parts_of_text: dict[str, set[int]] = {}
    for text, where in zip(TEXTS, part.tolist(), strict=True):
        parts_of_text.setdefault(text, set()).add(where)
    assert {len(parts) for parts in parts_of_text.values()} == {1}
    assert np.bincount(part) == pytest.approx([800, 100, 100], abs=12)
    assert any(TEXTS.count(text) > 1 for text in TEXTS), "a table without duplicates would prove nothing"


def test_random_split_is_exact_within_each_label_and_seeded() -> None:
    groups = Groups.from_hashes(np.arange(1000, dtype=np.uint64))
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    part = split_at_random(groups, labels, 42)
    for label, count in ((0, 500), (1, 300), (2, 200)):
        assert np.bincount(part[labels == label]).tolist() == [count * 8 // 10, count // 10, count // 10]
    assert (part == split_at_random(groups, labels, 42)).all()
    assert (part != split_at_random(groups, labels, 43)).any()


def test_time_split_trains_on_the_oldest() -> None:
    groups = Groups.from_hashes(np.arange(1000, dtype=np.uint64))
    part = split_by_time(groups, DATES)
    assert np.bincount(part).tolist() == [800, 100, 100]
    assert DATES[part == 0].max() < DATES[part == 1].min() < DATES[part == 1].max() < DATES[part == 2].min()


def test_a_repeated_text_goes_by_its_earliest_date() -> None:
    texts = [str(i) for i in range(9)] + ["0"]  # the newest row repeats the oldest
    dates = np.datetime64("2010-01-01", "s") + np.arange(10).astype("timedelta64[D]")
    part = split_by_time(Groups.from_hashes(hash_texts(texts)), dates)
    assert part[-1] == part[0] == 0
