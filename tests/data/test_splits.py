from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bertforge.data.splits import (
    Groups,
    complete_given,
    hash_texts,
    parts_named,
    split_at_random,
    split_by_time,
    split_into_folds,
)
from bertforge.errors import DataError

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


def test_labels_of_a_few_texts_are_held_out_too_and_all_train() -> None:
    groups = Groups.from_hashes(np.arange(600, dtype=np.uint64))
    labels = np.repeat(np.arange(100), 6)
    part = split_at_random(groups, labels, 42)
    assert np.bincount(part).tolist() == [480, 60, 60]
    assert set(labels[part == 0].tolist()) == set(range(100))
    assert max(np.bincount(labels[part > 0])) == 2, "spread over the labels"
    assert (part != split_at_random(groups, labels, 43)).any()
    # 900 rows of one label beside 7, 2 and 1 of others: it is cut as if they were not there.
    labels = np.repeat([0, 1, 2, 3], [900, 7, 2, 1])
    part = split_at_random(Groups.from_hashes(np.arange(910, dtype=np.uint64)), labels, 42)
    counts = [np.bincount(part[labels == label], minlength=3).tolist() for label in range(4)]
    assert counts == [[720, 90, 90], [5, 1, 1], [2, 0, 0], [1, 0, 0]]


def test_large_labels_are_cut_one_by_one() -> None:
    """Published figures rest on this split; it must not change."""
    groups = Groups.from_hashes(np.arange(4000, dtype=np.uint64))
    labels = np.random.default_rng(1).integers(2, size=4000)
    digest = hashlib.sha256(split_at_random(groups, labels, 42).tobytes()).hexdigest()
    assert digest.startswith("af7e703f71b3294d")


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


def test_each_row_is_tested_in_one_fold_and_texts_stay_together() -> None:
    groups = Groups.from_hashes(hash_texts(TEXTS))
    splits = np.array(split_into_folds(groups, LABELS, 5, 42))  # [folds, rows]
    assert ((splits == 2).sum(axis=0) == 1).all()
    for part in splits:
        assert np.bincount(part) == pytest.approx([720, 80, 200], abs=35)
        together = [set(part[groups.of_row == group].tolist()) for group in range(len(groups.size))]
        assert {len(parts) for parts in together} == {1}
    assert (splits == np.array(split_into_folds(groups, LABELS, 5, 42))).all()
    assert (splits != np.array(split_into_folds(groups, LABELS, 5, 43))).any()


def test_folds_hold_every_label_alike() -> None:
    groups = Groups.from_hashes(np.arange(1000, dtype=np.uint64))
    labels = np.repeat([0, 1, 2, 3], [500, 300, 198, 2])
    for part in split_into_folds(groups, labels, 4, 42):
        shares = [np.bincount(part[labels == label], minlength=3).tolist() for label in range(4)]
        assert shares[0] == pytest.approx([337.5, 37.5, 125], abs=1)
        assert shares[1] == pytest.approx([202.5, 22.5, 75], abs=1)
        assert shares[3][0] >= 1, "of two rows one is left to train"


def test_a_given_split_is_completed_from_the_train_rows() -> None:
    groups = Groups.from_hashes(np.arange(1000, dtype=np.uint64))
    given = np.where(np.arange(1000) < 900, 0, 2).astype(np.int8)
    part = complete_given(groups, LABELS, given, 42)
    assert (part[900:] == 2).all()
    assert np.bincount(part[:900]) == pytest.approx([810, 90], abs=2)
    only_train = complete_given(groups, LABELS, np.zeros(1000, dtype=np.int8), 42)
    assert np.bincount(only_train) == pytest.approx([800, 100, 100], abs=3)
    whole = np.array([0, 1, 2] * 300, dtype=np.int8)
    assert (complete_given(Groups.from_hashes(np.arange(900, dtype=np.uint64)), LABELS[:900], whole, 42) == whole).all()


def test_a_text_given_to_two_parts_stays_in_the_later_one() -> None:
    groups = Groups.from_hashes(hash_texts(["a", "b", "c", "d", "e", "A", "b", "C"]))
    given = np.array([0, 0, 1, 0, 0, 1, 2, 2], dtype=np.int8)
    assert complete_given(groups, np.zeros(8, dtype=np.int64), given, 42).tolist() == [-1, -1, -1, 0, 0, 1, 2, 2]


def test_parts_are_named_in_any_case_and_nothing_else_is_one() -> None:
    assert parts_named(["Train", "VALID", "val", "dev", "validation", "test"], "s").tolist() == [0, 1, 1, 1, 1, 2]
    with pytest.raises(DataError, match="split column s holds '', 'tst'; it may hold train"):
        parts_named(["tst", "", "train"], "s")
