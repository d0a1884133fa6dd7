"""Rows of a token store -> packed batches on the device, prepared one step ahead of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bertforge.batch import PackedBatch
from bertforge.data.packing import packs, shares
from bertforge.data.streaming import ahead
from bertforge.data.tokens import TokenStore
from bertforge.determinism import generator

IGNORED = -100  # the label of a sequence that only fills a pack; torch's cross_entropy leaves it out


@dataclass(frozen=True)
class Examples:
    """Everything a model reads and learns from, row by row."""

    tokens: TokenStore
    labels: np.ndarray
    """[rows] int64; -1 where a row has none."""
    sep_id: int
    """The token that ends a sequence; it stays when a longer one is cut."""
    max_length: int
    """Tokens a sequence is cut to."""
    tabular: dict[str, np.ndarray] | None = None
    """The columns beside the text, [rows, width] for each kind of `columns.registry`, by its name."""

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row after cutting, `[rows]` int64."""
        whole = self.tokens.offsets[rows + 1] - self.tokens.offsets[rows]
        return np.asarray(np.minimum(whole, self.max_length))

    def columns(self, rows: np.ndarray) -> dict[str, Tensor] | None:
        """The columns of some rows, as a batch has them."""
        if self.tabular is None:
            return None
        return {name: torch.from_numpy(array[rows]) for name, array in self.tabular.items()}

    def shares(self, rows: np.ndarray, count: int) -> list[np.ndarray]:
        """`rows` dealt to `count` processes by their tokens, each share in the order of `rows`."""
        if count == 1:
            return [rows]
        return [rows[places] for places in shares(self.lengths(rows), count)]

    def pack(self, rows: np.ndarray, shape: PackShape | None = None) -> tuple[PackedBatch, Tensor]:
        """The rows laid end to end, and their labels `[sequences]`, filled up to `shape` when there is one."""
        lengths = self.lengths(rows)
        bounds = np.concatenate([[0], np.cumsum(lengths)])  # [sequences + 1]
        positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)  # [tokens]
        ids = self.tokens.ids[np.repeat(self.tokens.offsets[rows], lengths) + positions].astype(np.int64)  # [tokens]
        ids[bounds[1:] - 1] = self.sep_id
        batch = PackedBatch(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            max_seqlen=int(lengths.max(initial=0)),
            tabular=self.columns(rows),
        )
        labels = torch.from_numpy(self.labels[rows])
        return (batch, labels) if shape is None else shape.fill(batch, labels, self.max_length)


@dataclass(frozen=True)
class Split:
    """What a run trains on and what it chooses the best epoch by."""

    examples: Examples
    train: np.ndarray
    """Row numbers."""
    validation: np.ndarray
    """Row numbers."""


@dataclass(frozen=True)
class PackShape:
    """The few shapes that packs are filled up to: one where a recorded graph is replayed, some where kernels are kept.

    A CPU's kernels are kept by shape, and a thousand shapes hold 5 GB (torch 2.13, all-MiniLM-L6-v2) for no speed; but
    where a step is a number of rows, the largest pack holds 1.4 times the tokens of the average one, and to fill all up
    to it would cost as much. The rest of the tokens becomes sequences of [PAD] no longer than a text may be, the rest
    of the sequences is empty; both have the label -100, which the loss leaves out.
    """

    tokens: int
    """Of the largest pack."""
    sequences: int
    step: int
    """Packs are filled up to the next multiple of so many tokens, `tokens` at most."""

    @classmethod
    def of(cls, plans: Iterable[list[np.ndarray]], examples: Examples, shapes: int = 1) -> Self:
        """That which holds every pack of `plans`, in at most so many `shapes`."""
        packed = [rows for plan in plans for rows in plan]
        tokens = max(int(examples.lengths(rows).sum()) for rows in packed)
        fill = -(-tokens // examples.max_length)  # sequences it takes to fill an empty pack
        return cls(tokens, max(map(len, packed)) + fill, -(-tokens // shapes))

    def fill(self, batch: PackedBatch, labels: Tensor, max_length: int) -> tuple[PackedBatch, Tensor]:
        """`batch` and `labels` `[self.sequences]` filled up; `max_seqlen` becomes `max_length`."""
        used, spare = batch.input_ids.numel(), self.sequences - len(batch)
        steps = max(1, -(-used // self.step))  # one at least: a process may have no row of a small pack
        tokens = min(self.tokens, steps * self.step)
        bounds = torch.arange(1, spare + 1) * max_length + used
        positions = torch.arange(tokens - used) % max_length
        filled = PackedBatch(
            input_ids=torch.nn.functional.pad(batch.input_ids, (0, tokens - used)),
            position_ids=torch.cat([batch.position_ids, positions]),
            cu_seqlens=torch.cat([batch.cu_seqlens, bounds.clamp(max=tokens).int()]),
            max_seqlen=max_length,
            tabular=batch.tabular and {name: _with_rows(array, spare) for name, array in batch.tabular.items()},
        )
        return filled, torch.nn.functional.pad(labels, (0, spare), value=IGNORED)


def _with_rows(array: Tensor, rows: int) -> Tensor:
    return torch.cat([array, array.new_zeros(rows, array.shape[1])])


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of `rows`, or all where there are fewer, at even distances from the first to the last."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return np.asarray(rows[places])


def epoch_plan(
    examples: Examples, rows: np.ndarray, budget: int, most_rows: int | None, seed: int, epoch: int
) -> list[np.ndarray]:
    """The steps of one epoch: `rows` in an order set by (seed, epoch) alone, cut into packs.

    A pack holds at most `budget` tokens and, unless it is None, `most_rows` rows.
    """
    order = generator(seed, "shuffle", epoch).permutation(rows)
    return [order[part] for part in packs(examples.lengths(order), budget, most_rows)]


def sorted_plan(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Places in `lengths` cut into packs of like length, the longest first, so that a lack of memory shows at once."""
    order = np.argsort(-lengths, kind="stable")
    return [order[part] for part in packs(lengths[order], budget)]


def load(
    examples: Examples, plan: Iterable[np.ndarray], device: torch.device, shape: PackShape | None = None
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """Packs on `device`, in the order of `plan`; a thread prepares the next one, and its errors are raised here."""

    def prepare(rows: np.ndarray) -> tuple[PackedBatch, Tensor]:
        batch, labels = examples.pack(rows, shape)
        return (batch.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (batch, labels)

    for batch, labels in ahead(map(prepare, plan)):
        yield batch.to(device), labels.to(device, non_blocking=True)
