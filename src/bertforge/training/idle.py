"""How much of training's time passes with no step at work: the device waits for input, or for the program.

On a GPU a step lasts from one CUDA event to another, so the time between steps counts as idle however far the program
runs ahead. The events are read where the loss is read anyway, when the GPU has reached them: measuring makes nobody
wait. On a CPU, which does both, idle is what the loop spends outside its steps, above all waiting for the loader.
Gaps within a step are not seen: a step that launches its kernels slowly counts as work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class IdleMeter:
    """Measures from where it is made to the first `read`, and from each `read` to the next."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: list[tuple[Any, Any]] = []
        self._since = time.perf_counter()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around a step, or other work that training would do anyway; not nested."""
        start = self._mark()
        yield
        self._steps.append((start, self._mark()))

    def read(self) -> tuple[float, float]:
        """Seconds without a step and seconds in all; on a GPU, only after a result of the last step has been read."""
        now = time.perf_counter()
        whole, busy = now - self._since, sum(_seconds(*marks) for marks in self._steps)
        self._steps.clear()
        self._since = now
        return max(0.0, whole - busy), whole  # two clocks may differ by a little

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _seconds(start: Any, end: Any) -> float:
    """Between two readings of the clock, or two CUDA events."""
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)
