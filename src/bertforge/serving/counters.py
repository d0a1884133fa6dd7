"""What a front was asked, counted by the quantities that drift is measured in, beside what the others were.

Each front counts the rows that it answers, some requests at a time, for to count one takes 0.1 ms and a hundred hardly
more. Once a second, while there are any, it writes its counters into a file of its own beside the engine's socket, and
whichever front is asked adds up all files. A front that was started again writes the file that it wrote before.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from bertforge.artifact import write_atomic
from bertforge.evaluation.drift import Monitor, Reference
from bertforge.inference.codec import Codec, is_blank
from bertforge.serving.preparing import Prepared, joined

_EVERY = 1.0  # seconds between two writes
_TOGETHER = 64  # requests that are counted at once

Snapshots = dict[str, dict[str, dict[str, list[int]]]]
"""By the model's name and its generation, the counts of each quantity."""


class Counters:
    """What this front was asked, and the others as they last wrote it."""

    def __init__(self, file: Path) -> None:
        """`file` is this front's own; those of the others differ in their number."""
        self._file = file
        self._counted: dict[str, _Counted] = {}  # by the model's name
        self._due = False

    def add(self, name: str, generation: str, codec: Codec, prepared: Prepared, logits: np.ndarray) -> None:
        """Rows that a model answered with `logits` `[rows, labels]`; in a running loop."""
        counted = self._counted.get(name)
        if counted is None or counted.generation != generation:
            counted = self._counted[name] = _Counted(generation, codec)
        counted.add(prepared, logits)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(_EVERY, self._write)

    def snapshots(self) -> Snapshots:
        """What this front was asked; in the event loop, which counts too."""
        found = ((name, counted.generation, counted.snapshot()) for name, counted in self._counted.items())
        return {name: {generation: counts} for name, generation, counts in found if counts}

    def others(self) -> list[Snapshots]:
        """What the others were; in any thread."""
        files = self._file.parent.glob(f"{self._file.stem.rpartition('-')[0]}-*{self._file.suffix}")
        return [json.loads(file.read_text()) for file in files if file != self._file]

    def _write(self) -> None:
        self._due = False
        with suppress(FileNotFoundError):  # the folder is gone with the service
            write_atomic(self._file, json.dumps(self.snapshots()))


class _Counted:
    """The rows of one model."""

    def __init__(self, generation: str, codec: Codec) -> None:
        self.generation = generation
        self._codec, reference = codec, Reference.of(codec.manifest)
        self._monitor = None if reference is None else Monitor(reference, codec.transform)
        self._waiting: list[tuple[Prepared, np.ndarray]] = []

    def add(self, prepared: Prepared, logits: np.ndarray) -> None:
        self._waiting.append((prepared, logits))
        if len(self._waiting) >= _TOGETHER:
            self._count()

    def snapshot(self) -> dict[str, list[int]] | None:
        """None where an earlier version trained the model."""
        self._count()
        return None if self._monitor is None else self._monitor.snapshot()

    def _count(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._monitor is None or not waiting:
            return
        rows = joined([prepared for prepared, _ in waiting])
        unknown = rows.ids == self._codec.tokenizer.unk_id  # [tokens]
        starts = np.cumsum(rows.lengths) - rows.lengths
        predicted = np.concatenate([logits.argmax(axis=1) for _, logits in waiting])
        predicted[[is_blank(text) for text in rows.texts]] = -1
        self._monitor.add(rows.lengths, np.add.reduceat(unknown, starts, dtype=np.int64), predicted, rows.columns)
