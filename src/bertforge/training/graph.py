"""Recording a CUDA graph: what a function launches, once, to be launched again as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # runs before recording, in which libraries choose and allocate what a graph may not


def record(
    function: Callable[[], Tensor], warm_up: Callable[[], Tensor] | None = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of `function`, and its result, which every replay overwrites; the random state stays as it was.

    `warm_up` is run before recording instead of `function`, where that would change something.
    """
    random_state = torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            (warm_up or function)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # NCCL's threads, and the one that pins the next pack, may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    torch.cuda.set_rng_state(random_state)  # as if the warm-up had not been
    return graph, result
