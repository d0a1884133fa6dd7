"""The curves of a run: a JSON-lines file for programs, TensorBoard for people."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from bertforge.artifact import write_atomic

METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


class History:
    """Writes each point as it comes; opened again with the points of a resumed run, it drops what came after them."""

    def __init__(self, directory: Path | None, points: list[dict[str, Any]]) -> None:
        """`points` are those of the checkpoint the run goes on from, none for a new run; without a folder, no files."""
        self.points = points
        self._file: TextIO | None = None
        self._board: Any = None
        if directory is None:
            return
        write_atomic(directory / METRICS, "".join(json.dumps(point) + "\n" for point in points))
        self._file = (directory / METRICS).open("a")
        self._board = _tensorboard(directory / "tensorboard", first_step=points[-1]["step"] + 1 if points else 0)

    def add(self, point: dict[str, Any]) -> None:
        """`point` holds `step`, and numbers by name."""
        self.points.append(point)
        if self._file:
            self._file.write(json.dumps(point) + "\n")
            self._file.flush()
        if self._board:
            for name, value in point.items():
                if name != "step":
                    self._board.add_scalar(name, value, point["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no TensorBoard curves: `pip install 'bertforge[tensorboard]'` brings them")
        return None
    return SummaryWriter(str(directory), purge_step=first_step)
