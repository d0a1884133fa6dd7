"""Time of GPU work, launching left out: CUDA graphs replayed between two events."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

CALLS = 10  # in a graph
REPLAYS = 20


def attempt(name: str, call: Callable[[], Any]) -> float | None:
    """Seconds, printed, or None with the reason printed: one failure costs one line of the table."""
    try:
        time_s = seconds(call)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:150]!r}", flush=True)
        return None
    print(f"{name}: {time_s * 1e6:.1f} us", flush=True)
    return time_s


def seconds(call: Callable[[], Any]) -> float:
    """Of one call: the median over replays of a CUDA graph that holds several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / CALLS)
    return statistics.median(times[3:])
