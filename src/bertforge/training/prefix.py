"""The frozen prefix: embeddings and lowest layers that nothing trains, computed once and not once an epoch.

Below the lowest trainable parameter a row's hidden states are the same in every epoch, as long as nothing is drawn at
random there, so these layers run in eval mode, without gradients. The first epoch keeps their output (row_cache.py),
and later epochs begin above them. That is exact, bit for bit, because a row's output does not depend on the rest of its
pack: attention keeps to the sequence, and packs of one shape meet the same matrix kernels, which sum in the same order
for every token.

A model whose embeddings or lowest layer are trained has no prefix and keeps the dropout of its embeddings: the
embeddings alone would cost more to keep than to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from bertforge.batch import LowerLayers, PackedBatch
from bertforge.data.loader import Split
from bertforge.data.streaming import ahead
from bertforge.hardware import autocast
from bertforge.model.bert import BertModel
from bertforge.training.distributed import World
from bertforge.training.graph import record
from bertforge.training.row_cache import Room, RowCache, fits


def frozen_layers(model: BertModel) -> int:
    """How many layers lie below the lowest trainable parameter: 0 when the embeddings or the lowest layer have one."""
    parts: list[nn.Module] = [model.embeddings, *model.encoder.layer]
    trained = (any(parameter.requires_grad for parameter in part.parameters()) for part in parts)
    return max(0, next((number for number, found in enumerate(trained) if found), len(parts)) - 1)


@dataclass(frozen=True)
class EagerPrefix:
    """The embeddings and the lowest `layers` layers as training computes them."""

    model: BertModel
    layers: int
    precision: str

    def __call__(self, batch: PackedBatch) -> Tensor:
        """`[tokens, hidden]`."""
        for part in (self.model.embeddings, *self.model.encoder.layer[: self.layers]):
            part.eval()  # the model around it is in training mode, whose dropout would make every epoch another
        with torch.no_grad(), autocast(batch.input_ids.device, self.precision):
            return self.model.lower_layers(batch, self.layers).hidden


class GraphedPrefix:
    """`EagerPrefix` recorded at its first pack; every later pack must have that one's shape."""

    def __init__(self, eager: EagerPrefix) -> None:
        self.eager = eager
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: PackedBatch) -> Tensor:
        """As `EagerPrefix`; the next call overwrites the result."""
        batch = replace(batch, tabular=None)  # no business of these layers
        if self.graph is None:
            self.batch = batch.map(Tensor.clone)
            self.graph, self.hidden = record(lambda: self.eager(self.batch))
        for static, value in zip(self.batch.tensors(), batch.tensors(), strict=True):
            static.copy_(value)
        self.graph.replay()
        return self.hidden


class FrozenPrefix:
    """The frozen layers of a run and what is kept of their output."""

    def __init__(
        self,
        eager: EagerPrefix,
        split: Split,
        epochs: int,
        cache_gb: float | None,
        world: World,
        *,
        graphed: bool,
    ) -> None:
        """Keeps the output of the train rows where memory has room, up to `cache_gb` where that is given.

        Several processes keep nothing: each epoch deals the rows anew, so a process would seldom meet a whole pack of
        rows that it met before. Raises MachineError when the system does not give the room that it said was free.
        """
        self.layers = eager.layers
        self._compute: Callable[[PackedBatch], Tensor] = GraphedPrefix(eager) if graphed else eager
        examples, rows, device = split.examples, split.train, next(eager.model.parameters()).device
        lengths = examples.lengths(rows)
        sample = eager(examples.pack(rows[:1])[0].to(device))  # [tokens, hidden]: its type and width are what counts
        room = Room.free(device) if cache_gb is None else Room.free(device).within(int(cache_gb * 1e9))
        read = epochs > 1 and world.size == 1
        self.cache = RowCache(rows, lengths, sample, room) if read and fits(lengths, sample, room) else None
        frozen, whose = ("layer 0 is", "its") if self.layers == 1 else (f"layers 0 to {self.layers - 1} are", "their")
        if self.cache:
            fate = f"{_size(sum(self.cache.bytes.values()))} of {whose} output are kept, {_tiers(self.cache)}"
        elif epochs == 1:
            fate = f"the one epoch computes {whose} output without gradients"
        elif world.size > 1:
            fate = f"every epoch computes {whose} output anew: rows move between processes"
        else:
            whole, found = _size(int(lengths.sum()) * sample[0].nbytes), _size(room.total())
            asked = cache_gb
            limit = f"there is room for {found}" if asked is None else f"prefix_cache_gb={asked:g} leaves {found}"
            fate = f"{whose} output takes {whole}, but {limit}, so every epoch computes it anew"
        self.description = f"{frozen} frozen: {fate}"

    def forget(self) -> None:
        """As if no pack had been fed yet."""
        if self.cache:
            self.cache.forget()

    def feed(
        self,
        packs: Iterable[tuple[PackedBatch, Tensor]],
        plan: list[np.ndarray],
        tokens: int,
        work: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[tuple[PackedBatch, Tensor]]:
        """The same packs of `tokens`, and their labels, with the output of these layers; `plan` is each one's rows.

        `work` is entered around what is done for a pack once it is there.
        """
        cache = self.cache
        staged = ahead(cache.stage(rows, tokens) if cache else None for rows in plan)
        for rows, (batch, labels), ready in zip(plan, packs, staged, strict=True):
            with work():
                if cache and ready:
                    hidden = cache.gather(ready)
                else:
                    hidden = self._compute(batch)
                    if cache:
                        cache.put(rows, hidden)
            yield replace(batch, lower=LowerLayers(hidden, self.layers)), labels


def _tiers(cache: RowCache) -> str:
    return ", ".join(f"{_size(size)} {tier}" for tier, size in cache.bytes.items() if size)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
