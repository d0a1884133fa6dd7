"""Fixed shapes an engine is built for, and the lengths they should have.

A GPU's kernels are fastest when the shape is known while the engine is built, and a recorded CUDA graph has one shape
only. So an engine has a few buckets: at each of a few lengths (the edges) one bucket that holds a whole batch and one
of a single row, for a question that comes alone. A row is padded up to the next edge, a batch to its bucket's rows.

The edges are chosen from the lengths of real rows to minimise the expected time: exactly, by dynamic programming over
the multiples of STEP. The time of a row of n tokens is taken as n (1 + n / 6 hidden): a BERT layer does 24 hidden^2
operations a token in its linear layers and 4 n hidden in attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEP = 16  # tokens; tensor cores work on tiles of 16
EDGES = 6
USUAL = (64, 128, 256, 512)  # where no data says better
TOKENS = 16_384  # of a whole batch


@dataclass(frozen=True)
class Bucket:
    """A shape: `rows` sequences of `length` tokens, padding included."""

    rows: int
    length: int


def choose_edges(lengths: np.ndarray, longest: int, hidden: int, count: int = EDGES) -> tuple[int, ...]:
    """At most `count` edges, ascending, the last of them `longest`, for rows of `lengths` tokens.

    Every length is at most `longest`. No other choice of `count` multiples of STEP has a lower expected time.
    """
    edges = np.array([*range(STEP, longest, STEP), longest])  # [n]
    below = np.searchsorted(np.sort(lengths), edges, side="right")  # [n] rows no longer than the edge
    time = edges * (1 + edges / (6 * hidden))  # [n] of one row padded to the edge
    # between[i, j]: the time of the rows longer than edge i when they are padded to edge j, where i < j
    between = np.triu((below[None, :] - below[:, None]) * time[None, :], 1)
    between[np.tril_indices(len(edges))] = np.inf
    best = [below * time]  # best[k][j]: the time of the rows up to edge j with k + 1 edges, j the last of them
    came_from = []
    for _ in range(min(count, len(edges)) - 1):
        through = best[-1][:, None] + between  # [n, n]
        came_from.append(through.argmin(axis=0))
        best.append(through.min(axis=0))
    used = int(np.argmin([times[-1] for times in best]))  # the fewest edges, where more of them gain nothing
    chosen = [len(edges) - 1]
    for step in reversed(came_from[:used]):
        chosen.append(int(step[chosen[-1]]))
    return tuple(int(edges[place]) for place in reversed(chosen))


def usual_edges(longest: int) -> tuple[int, ...]:
    """Edges for texts of which only the largest length is known."""
    return (*(edge for edge in USUAL if edge < longest), longest)


def buckets_of(edges: tuple[int, ...], tokens: int = TOKENS) -> tuple[Bucket, ...]:
    """Two buckets an edge, the longest and fullest first: as many rows as fit into `tokens`, and one row."""
    sizes = {(max(1, tokens // edge), edge) for edge in edges} | {(1, edge) for edge in edges}
    return tuple(Bucket(*size) for size in sorted(sizes, key=lambda size: (-size[1], -size[0])))


def waste(lengths: np.ndarray, edges: tuple[int, ...]) -> float:
    """Tokens of padding for one real token when each row is padded to its edge."""
    padded = np.array(edges)[np.searchsorted(edges, lengths)]
    return float(padded.sum() / lengths.sum() - 1)
