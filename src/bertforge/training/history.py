"""The curves of a run: a JSON-lines file for programs, TensorBoard for people.

TensorBoard's records are written here, in the thread that trains: its own writer has a thread, which on a full disk
prints a traceback of its own.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from bertforge.artifact import naming, write_atomic

METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


class History:
    """Writes each point as it comes; opened again with the points of a resumed run, it drops what came after them."""

    def __init__(self, directory: Path | None, points: list[dict[str, Any]]) -> None:
        """`points` are those of the checkpoint the run goes on from, none for a new run; without a folder, no files."""
        self.points = points
        self._file: TextIO | None = None
        self._board: _Board | None = None
        if directory is None:
            return
        self._path = write_atomic(directory / METRICS, "".join(json.dumps(point) + "\n" for point in points))
        self._file = self._path.open("a")
        self._board = _board(directory / "tensorboard", first_step=points[-1]["step"] + 1 if points else 0)

    def add(self, point: dict[str, Any]) -> None:
        """`point` holds `step`, and numbers by name."""
        self.points.append(point)
        if self._file:
            with naming(self._path):
                self._file.write(json.dumps(point) + "\n")
                self._file.flush()
        if self._board:
            self._board.add(point)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            with naming(self._path):
                self._file.close()
        if self._board:
            self._board.close()


class _Board:
    """A file of TensorBoard's events."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Events of an earlier file from `first_step` on are no longer shown."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._file = self._path.open("xb")
        self._writer, self._event = RecordWriter(self._file), Event
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, point: dict[str, Any]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in point.items() if name != "step"]
        self._write(step=point["step"], summary={"value": values})

    def close(self) -> None:
        with naming(self._path):
            self._file.close()

    def _write(self, **fields: Any) -> None:
        with naming(self._path):
            self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._writer.flush()


def _board(directory: Path, first_step: int) -> _Board | None:
    try:
        return _Board(directory, first_step)
    except ImportError:
        log.info("no TensorBoard curves: `pip install 'bertforge[tensorboard]'` brings them")
        return None
