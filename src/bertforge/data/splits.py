"""Which rows train, validate and test: 80/10/10 at random or by time, in folds, or as the user says.

Two rows are duplicates when their texts are equal after lower-casing and collapsing white space; a group of duplicates
moves as one row, and never stands in two parts. A split is an int8 array, one entry per row: 0 train, 1 validation,
2 test, -1 in none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bertforge.errors import DataError

PARTS = ("train", "validation", "test")
NO_PART = -1
_PART_NAMES = {"train": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2}
_SHARES = (0.8, 0.9)  # where validation and test begin
_SMALL = 8  # texts of a label below which rounding could leave a part without a tenth

Ints = NDArray[np.int64]


def hash_texts(texts: Iterable[str]) -> NDArray[np.uint64]:
    """[rows] 64-bit hashes of the normalised texts; among 3.4 million texts, two collide with odds of 3e-7."""
    blake2b = hashlib.blake2b
    digests = [blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


@dataclass(frozen=True)
class Groups:
    """Rows with the same text, as group numbers 0, 1, ... in order of first appearance."""

    of_row: Ints
    """[rows] the row's group."""
    first_row: Ints
    """[groups] where the group appears first."""
    size: Ints
    """[groups] its rows."""

    @classmethod
    def from_hashes(cls, hashes: NDArray[np.uint64]) -> Groups:
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        order = np.argsort(first)  # by appearance, so that nothing depends on what the hashes happen to be
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        of_row = rank[inverse]
        return cls(of_row, first[order], np.bincount(of_row))

    def count_conflicts(self, labels: Ints) -> int:
        """Groups whose rows carry different labels."""
        differs = labels != labels[self.first_row][self.of_row]
        return len(np.unique(self.of_row[differs]))


def split_at_random(groups: Groups, labels: Ints, seed: int) -> NDArray[np.int8]:
    """80/10/10 within every label; a group counts under the label of its first row.

    A label of fewer than `_SMALL` groups has no whole tenth to give. Such labels stand in one line, of which every ten
    give one to validation and one to test; a label of one or two groups only trains.
    """
    return _draw(labels[groups.first_row], groups.size, seed)[groups.of_row]


def split_into_folds(groups: Groups, labels: Ints, folds: int, seed: int) -> list[NDArray[np.int8]]:
    """One split a fold, whose test part the fold is; a tenth of the other rows validates.

    Each row is in the test part of one fold, and each label is spread over the folds as evenly as its groups allow.
    """
    label = labels[groups.first_row]  # [groups]
    shuffled = np.random.default_rng(seed).permutation(len(label))
    fold = np.empty(len(label), dtype=np.int64)
    fold[shuffled[np.argsort(label[shuffled], kind="stable")]] = np.arange(len(label)) % folds
    splits = []
    for number in range(folds):
        rest = np.flatnonzero(fold != number)
        part = np.full(len(label), 2, dtype=np.int8)
        part[rest] = _draw(label[rest], groups.size[rest], seed) == 1
        splits.append(part[groups.of_row])
    return splits


def complete_given(groups: Groups, labels: Ints, given: NDArray[np.int8], seed: int) -> NDArray[np.int8]:
    """A split that the user made, made whole.

    A text that stands in several parts stays in the last of them only, test before validation before train: its other
    rows are in no part (`NO_PART`), for the test rows a user chose are what figures are compared on. A validation or
    test part that is missing is drawn from the train rows, a tenth of them.
    """
    part = np.zeros(len(groups.size), dtype=np.int8)  # [groups]
    np.maximum.at(part, groups.of_row, given)
    repeated = given < part[groups.of_row]
    train = np.flatnonzero(part == 0)
    drawn = _draw(labels[groups.first_row][train], groups.size[train], seed)
    for missing in {1, 2} - set(part.tolist()):
        part[train[drawn == missing]] = missing
    return np.where(repeated, NO_PART, part[groups.of_row]).astype(np.int8)


def parts_named(values: Iterable[str], column: str) -> NDArray[np.int8]:
    """[rows] the parts that a column of a table names; raises DataError for a value that is none."""
    found = list(values)
    if unknown := sorted({value for value in found if value.lower() not in _PART_NAMES}):
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"split column {column} holds {shown}; it may hold train, validation (valid, val, dev) and test"
        )
    return np.array([_PART_NAMES[value.lower()] for value in found], dtype=np.int8)


def split_by_time(groups: Groups, dates: NDArray[np.datetime64]) -> NDArray[np.int8]:
    """The oldest 80% train, the next 10% validate, the newest 10% test; a group goes by its earliest date."""
    earliest = np.full(len(groups.size), np.iinfo(np.int64).max)
    np.minimum.at(earliest, groups.of_row, dates.astype("datetime64[s]").astype(np.int64))
    order = np.argsort(earliest, kind="stable")
    part = np.empty(len(order), dtype=np.int8)
    part[order] = _cut(groups.size[order])
    return part[groups.of_row]


def _draw(label: Ints, size: Ints, seed: int) -> NDArray[np.int8]:
    """[groups] a part for each group of `label` and `size` rows, see `split_at_random`."""
    shuffled = np.random.default_rng(seed).permutation(len(label))
    part = np.zeros(len(label), dtype=np.int8)
    line: list[Ints] = []
    for value in np.unique(label):
        members = shuffled[label[shuffled] == value]
        if len(members) >= _SMALL:
            part[members] = _cut(size[members])
        elif len(members) > 2:  # two neighbours are held out, so each label keeps a group that trains
            line.append(members)
    if line:
        in_line = np.concatenate(line)
        part[in_line[3::10]], part[in_line[4::10]] = 1, 2
    return part


def _cut(sizes: Ints) -> NDArray[np.int8]:
    """[groups] the part of each group of an ordered list: it goes where its first row falls."""
    bounds = np.floor(np.array(_SHARES) * sizes.sum() + 0.5)
    return np.searchsorted(bounds, np.cumsum(sizes) - sizes, side="right").astype(np.int8)
