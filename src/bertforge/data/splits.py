"""Which rows train, validate and test: 80/10/10, at random or by time, never with duplicates in two splits.

Two rows are duplicates when their texts are equal after lower-casing and collapsing white space; a group of duplicates
moves as one row. A split is an int8 array, one entry per row: 0 train, 1 validation, 2 test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PARTS = ("train", "validation", "test")
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
    label = labels[groups.first_row]  # [groups]
    shuffled = np.random.default_rng(seed).permutation(len(label))
    part = np.zeros(len(label), dtype=np.int8)
    line: list[Ints] = []
    for value in np.unique(label):
        members = shuffled[label[shuffled] == value]
        if len(members) >= _SMALL:
            part[members] = _cut(groups.size[members])
        elif len(members) > 2:  # two neighbours are held out, so each label keeps a group that trains
            line.append(members)
    if line:
        in_line = np.concatenate(line)
        part[in_line[3::10]], part[in_line[4::10]] = 1, 2
    return part[groups.of_row]


def split_by_time(groups: Groups, dates: NDArray[np.datetime64]) -> NDArray[np.int8]:
    """The oldest 80% train, the next 10% validate, the newest 10% test; a group goes by its earliest date."""
    earliest = np.full(len(groups.size), np.iinfo(np.int64).max)
    np.minimum.at(earliest, groups.of_row, dates.astype("datetime64[s]").astype(np.int64))
    order = np.argsort(earliest, kind="stable")
    part = np.empty(len(order), dtype=np.int8)
    part[order] = _cut(groups.size[order])
    return part[groups.of_row]


def _cut(sizes: Ints) -> NDArray[np.int8]:
    """[groups] the part of each group of an ordered list: it goes where its first row falls."""
    bounds = np.floor(np.array(_SHARES) * sizes.sum() + 0.5)
    return np.searchsorted(bounds, np.cumsum(sizes) - sizes, side="right").astype(np.int8)
