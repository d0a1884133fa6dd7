"""Rows' hidden states, kept from epoch to epoch in memory: the GPU's first, then the host's.

Rows fill the two in order, each row whole in one block, its tokens side by side. Either all rows have room or nothing
is kept: a pack of 40 rows, each kept with a chance of 9 in 10, would find all of them once in 68 times.

Host memory is taken in blocks of 1 GiB, since torch pins a power of two of bytes, whatever it is asked for; for a GPU
it is pinned. A third tier, on disk, was taken out: to fill it took what 23 epochs gave back (docs/engineering-log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bertforge.errors import MachineError
from bertforge.hardware import free_host_bytes

GPU, HOST = "on the GPU", "in host memory"
_SHARE = 0.5  # of what is free; training, other programs and the page cache need the rest
_BLOCK = 1 << 30  # bytes


@dataclass(frozen=True)
class Room:
    """Bytes that may be kept in each memory."""

    gpu: int
    host: int

    @classmethod
    def free(cls, device: torch.device) -> Room:
        """Half of what is free now: on `device` where it is a GPU, and in host memory."""
        gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        return cls(int(_SHARE * gpu), int(_SHARE * free_host_bytes()))

    def within(self, total: int) -> Room:
        """The same room, but `total` bytes in all, the GPU's first."""
        gpu = min(self.gpu, total)
        return Room(gpu, min(self.host, total - gpu))

    def blocks(self) -> list[tuple[str, int]]:
        """Tier and bytes of every block."""
        whole, rest = divmod(self.host, _BLOCK)
        return [(GPU, self.gpu), *[(HOST, _BLOCK)] * whole, (HOST, rest)]

    def total(self) -> int:
        """Bytes in all."""
        return self.gpu + self.host


@dataclass(frozen=True)
class Staged:
    """A pack of kept rows, prepared by the CPU."""

    hidden: Tensor
    """`[tokens, hidden]` in (pinned) host memory, zeros for what lies on the GPU; `[1, hidden]` when all of it does."""
    source: Tensor | None
    """[tokens] int64: each token's place in the GPU's block, -1 where it is not there; None without such a block."""


class RowCache:
    """Hidden states by row number; `put` once, then `stage` (in any thread) and `gather`."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, sample: Tensor, room: Room) -> None:
        """Takes the room that `rows` of `lengths` tokens need; `sample` is `[any, hidden]`, of their type and device.

        `fits` must hold. Raises MachineError when the system does not give what it said was free.
        """
        self.device = sample.device
        self._written = torch.cuda.Event() if sample.is_cuda else None  # type: ignore[no-untyped-call]
        self._blocks: list[Tensor] = []
        self._gpu: Tensor | None = None
        self.bytes = dict.fromkeys((GPU, HOST), 0)
        count = int(rows.max()) + 1
        self._block, self._start, self._length = (np.zeros(count, dtype=np.int64) for _ in range(3))
        self._filled = np.zeros(count, dtype=bool)
        self._length[rows] = lengths
        for (tier, _), part in zip(room.blocks(), _laid_out(lengths, sample, room), strict=True):
            if part.start == part.stop:
                continue
            own = lengths[part]
            self._block[rows[part]] = len(self._blocks)
            self._start[rows[part]] = np.cumsum(own) - own
            block = _allocate(tier, (int(own.sum()), sample.shape[1]), sample)
            self._blocks.append(block)
            self.bytes[tier] += block.nbytes
            if tier == GPU:
                self._gpu = block

    def put(self, rows: np.ndarray, hidden: Tensor) -> None:
        """Keeps the hidden states of a pack that begins with `rows`, one after another: `[tokens, hidden]`."""
        for row, (block, kept, packed) in zip(rows, self._places(rows), strict=True):
            self._blocks[block][kept].copy_(hidden[packed], non_blocking=True)
            self._filled[row] = True
        if self._written is not None:
            self._written.record()

    def forget(self) -> None:
        """Keeps the room, but no row."""
        self._filled[:] = False

    def stage(self, rows: np.ndarray, tokens: int) -> Staged | None:
        """What `gather` needs for a pack of `rows` filled up to `tokens`; None while a row of it is missing."""
        if not self._filled[rows].all():
            return None
        if self._written is not None:
            self._written.synchronize()  # the GPU may be writing to pinned memory still
        places = list(self._places(rows))
        on_gpu = [self._blocks[block] is self._gpu for block, _, _ in places]
        width, dtype = self._blocks[0].shape[1], self._blocks[0].dtype
        pinned = self.device.type == "cuda"
        nothing = self._gpu is not None and all(on_gpu)
        hidden = torch.empty(1 if nothing else tokens, width, dtype=dtype, pin_memory=pinned)
        # By NumPy: torch would copy with threads of its own beside those that train, and slow both down.
        packs = _bytes(hidden)
        packs[:] = 0
        source = torch.full((tokens,), -1, pin_memory=pinned)
        for (block, kept, packed), there in zip(places, on_gpu, strict=True):
            if there:
                source[packed] = torch.arange(kept.start, kept.stop)
            else:
                packs[packed] = _bytes(self._blocks[block])[kept]
        return Staged(hidden, None if self._gpu is None else source)

    def gather(self, staged: Staged) -> Tensor:
        """The pack's hidden states `[tokens, hidden]` on the device; what fills the pack is zero."""
        hidden = staged.hidden.to(self.device, non_blocking=True)
        if staged.source is None or self._gpu is None:
            return hidden
        source = staged.source.to(self.device, non_blocking=True)  # [tokens]
        kept = self._gpu.index_select(0, source.clamp_min(0))  # [tokens, hidden]
        return torch.where(source[:, None] >= 0, kept, hidden)

    def _places(self, rows: np.ndarray) -> Iterator[tuple[int, slice, slice]]:
        """Each row's block, its tokens in it, and its tokens in a pack of `rows`."""
        lengths = self._length[rows]
        ends = np.cumsum(lengths)
        numbers = zip(*(array.tolist() for array in (self._block[rows], self._start[rows], lengths, ends)), strict=True)
        for block, start, length, end in numbers:
            yield block, slice(start, start + length), slice(end - length, end)


def _bytes(tensor: Tensor) -> np.ndarray:
    """The same memory, `[rows, bytes]`: NumPy knows no bfloat16."""
    return np.asarray(tensor.view(torch.uint8).numpy())


def fits(lengths: np.ndarray, sample: Tensor, room: Room) -> bool:
    """Whether `room` holds rows of `lengths` tokens, each token like one of `sample`."""
    return int(_laid_out(lengths, sample, room)[-1].stop) == len(lengths)


def _laid_out(lengths: np.ndarray, sample: Tensor, room: Room) -> list[slice]:
    """Which rows lie in each of the room's blocks."""
    token = sample.shape[1] * sample.element_size()
    ends = np.concatenate([[0], np.cumsum(lengths)])  # [rows + 1]
    parts, start = [], 0
    for _, size in room.blocks():
        stop = int(np.searchsorted(ends, ends[start] + size // token, side="right")) - 1
        parts.append(slice(start, stop))
        start = stop
    return parts


def _allocate(tier: str, shape: tuple[int, int], sample: Tensor) -> Tensor:
    device = sample.device if tier == GPU else torch.device("cpu")
    try:
        return torch.empty(shape, dtype=sample.dtype, device=device, pin_memory=tier == HOST and sample.is_cuda)
    except RuntimeError as error:  # torch has no memory
        size, reason = shape[0] * shape[1] * sample.element_size(), " ".join(str(error).split())[:80]
        raise MachineError(
            f"no room for {size / 1e9:.1f} GB of the frozen layers' output {tier} ({reason}); "
            "keep none with --set prefix_cache_gb=0"
        ) from error
