"""The forward pass as recorded CUDA graphs, one for each of some sizes of a pack: a request takes the smallest.

Launched one by one, the kernels of a single question wait for Python ten times as long as they run. A recorded graph is
one launch, but of one shape: so a pack is filled up to the next rung's tokens, which belong to no sequence, and to its
sequences, which are empty. Attention does nothing for either, so what filling costs is the products of some tokens:
of a third of a rung at worst, or half of the smallest, for texts as long as usual. Many that are much shorter need a
rung with room for as many, so a rung's room for sequences follows from the texts of the train rows.

All rungs write to one `Room` and run on one stream, one after another. What a pack needs is one copy of int32 numbers
from pinned memory, one launch and one copy back. Two threads may call at a time: while the GPU works on one pack, the
other is laid out and waits in the stream's queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertforge.batch import PackedBatch
from bertforge.errors import UsageError
from bertforge.native.network import Network

TOKENS = (
    *(32, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
    *(6144, 8192, 12_288, 16_384, 24_576, 32_768, 49_152, 65_536),
)
USUAL = 64  # tokens of a text, where nothing is known of the texts
_LEAST = 512  # sequences a rung has room for, if it has 4 tokens for each
_MULTIPLE = 16  # of sequences: Triton compiles a kernel anew for numbers that 16 does not divide


@dataclass(frozen=True)
class Size:
    """How much fits into a pack."""

    tokens: int
    sequences: int


def sizes(usual: int) -> list[Size]:
    """Every rung of a ladder for texts that are rarely shorter than `usual` tokens, ascending."""
    return [Size(tokens, _sequences(tokens, usual)) for tokens in TOKENS]


def _sequences(tokens: int, usual: int) -> int:
    # Attention looks at every sequence there is room for, also at empty ones: 8,192 of them make it four times slower.
    wanted = max(min(tokens // 4, _LEAST), tokens // max(usual, 4))
    return -(-wanted // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class _Rung:
    size: Size
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    """[2 * tokens + sequences + 1] int32: ids, positions, cu_seqlens."""
    result: Tensor
    """[sequences, labels or hidden] float32."""


@dataclass(frozen=True)
class _Slot:
    """Pinned memory of one call under way."""

    inputs: Tensor
    result: Tensor
    done: torch.cuda.Event


class Ladder:
    """Recorded graphs of a network."""

    def __init__(self, network: Network, sizes: list[Size], calls: int) -> None:
        """Records every rung; `calls` may be under way at once."""
        self.sizes, self._lock, self._slots = sizes, Lock(), SimpleQueue[_Slot]()
        self._positions = network.weights.config.max_position_embeddings
        self._stream: torch.cuda.Stream = torch.cuda.Stream(network.weights.words.device)  # type: ignore[no-untyped-call]
        self._rungs: list[_Rung] = []
        largest = sizes[-1]
        # Graphs keep no memory alive but what they allocate themselves: the room lives as long as they do.
        self._room, pool = network.room(largest.tokens, largest.sequences), torch.cuda.graph_pool_handle()
        for size in reversed(sizes):  # the largest first: what others allocate beside the room fits into its memory
            self._rungs.insert(0, self._record(network, size, pool))
        for _ in range(calls):
            inputs, result = (_pinned(part) for part in (self._rungs[-1].inputs, self._rungs[-1].result))
            self._slots.put(_Slot(inputs, result, torch.cuda.Event()))  # type: ignore[no-untyped-call]

    def _record(self, network: Network, size: Size, pool: Any) -> _Rung:
        device = network.weights.words.device
        inputs = torch.zeros(2 * size.tokens + size.sequences + 1, dtype=torch.int32, device=device)
        ids, positions, bounds = torch.split(inputs, [size.tokens, size.tokens, size.sequences + 1])
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            network(ids, positions, bounds, self._room)  # kernels are compiled and loaded, which no graph records
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # torch.cuda.graph would empty the allocator's cache each time. Other threads may go on with their work.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = network(ids, positions, bounds, self._room)
            finally:
                graph.capture_end()
        return _Rung(size, graph, inputs, result)

    def __call__(self, batch: PackedBatch, before: Callable[[], None] = lambda: None) -> np.ndarray:
        """`[sequences, labels or hidden]` float32; raises UsageError for a pack or a text that is too large.

        `before` may put other weights in place: it is called where no other pack comes between.
        """
        tokens, sequences = batch.input_ids.numel(), len(batch)
        if batch.max_seqlen > self._positions:
            raise UsageError(
                f"a sequence has {batch.max_seqlen} tokens, but this model holds {self._positions}; "
                f"truncate to max_length={self._positions}"
            )
        rung = next((r for r in self._rungs if r.size.tokens >= tokens and r.size.sequences >= sequences), None)
        if rung is None:
            largest = self.sizes[-1]
            raise UsageError(
                f"a pack has {tokens:,} tokens in {sequences:,} sequences, but this engine takes at most "
                f"{largest.tokens:,} in {largest.sequences:,}; cut it: engine.shape has these limits"
            )
        slot = self._slots.get()
        try:
            _lay_out(batch, rung.size, slot.inputs.numpy())
            with self._lock, torch.cuda.stream(self._stream):
                before()
                rung.inputs.copy_(slot.inputs[: len(rung.inputs)], non_blocking=True)
                rung.graph.replay()
                slot.result[:sequences].copy_(rung.result[:sequences], non_blocking=True)
                slot.done.record()
            slot.done.synchronize()
            found: np.ndarray = slot.result[:sequences].numpy().copy()
            return found
        finally:
            self._slots.put(slot)


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _lay_out(batch: PackedBatch, size: Size, numbers: np.ndarray) -> None:
    """Writes ids, positions and bounds; behind the pack's own are zeros, and empty sequences at its end."""
    start = 0
    for values, room, rest in (
        (batch.input_ids, size.tokens, 0),
        (batch.position_ids, size.tokens, 0),
        (batch.cu_seqlens, size.sequences + 1, batch.input_ids.numel()),
    ):
        numbers[start : start + len(values)] = values.numpy()
        numbers[start + len(values) : start + room] = rest
        start += room
