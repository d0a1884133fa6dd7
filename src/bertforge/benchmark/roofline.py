"""How much of the machine an engine uses: the work that had to be done, against the fastest matrix product here.

Work that need not be done earns nothing: padding, and in the last layer all but keys and values beyond the first
token, which is the one the head reads. So an engine that computes such things shows a lower share.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from bertforge.hardware import Hardware
from bertforge.matrix_product import product_seconds
from bertforge.model.config import BertConfig

_SECONDS = 0.5  # of measuring a size, so that a moment's other work does not count
_TOO_LONG = 2.0  # seconds of one product: it is a loop in plain C++, as bfloat16's is on a CPU without its instructions


def needed_flops(config: BertConfig, lengths: np.ndarray) -> float:
    """Floating-point operations of the matrix products that classifying texts of these `lengths` takes."""
    tokens, squares, texts = float(lengths.sum()), float((lengths.astype(float) ** 2).sum()), len(lengths)
    hidden, wide = config.hidden_size, config.intermediate_size
    key_value, query_and_rest = 2 * hidden * hidden, 2 * hidden * hidden + 2 * hidden * wide  # multiply-adds a token
    below = (config.num_hidden_layers - 1) * (tokens * (key_value + query_and_rest) + 2 * hidden * squares)
    last = tokens * (key_value + 2 * hidden) + texts * query_and_rest
    head = texts * hidden * (hidden + len(config.labels))
    return 2 * (below + last + head)


def product_rate(hardware: Hardware, precision: str) -> float | None:
    """FLOP/s of the fastest matrix product in `precision` here and now; None for fp8 on a CPU."""
    device = hardware.device.type
    if device == "cpu" and precision == "fp8":  # a loop in plain C++, a thousand times slower
        return None
    sizes = (8192,) if device == "cuda" else (512, 1024, 2048)
    threads = torch.get_num_threads()
    torch.set_num_threads(hardware.cores)  # as the engines do; OMP_NUM_THREADS may say less
    try:
        rates = []
        for size in sizes:
            seconds = product_seconds(device, precision, (size, size, size), _SECONDS)
            rates.append(2.0 * size**3 / seconds)
            if 8 * seconds > _TOO_LONG:  # of the next size, twice as wide
                break
        return max(rates)
    finally:
        torch.set_num_threads(threads)


def add_shares(rows: list[dict[str, Any]], flops: float) -> None:
    """Adds `share_of_ceiling` to each row that was measured; a text needs `flops`.

    The ceiling is the highest `product_rate` of the rows of one precision. Without one, and where the engine was
    faster, the share is None.
    """
    measured = [row for row in rows if "missing" not in row]
    for row in measured:
        rates = [each["product_rate"] for each in measured if each["precision"] == row["precision"]]
        share = flops * row["questions_per_s"] / max(rates) if None not in rates else math.inf
        row["share_of_ceiling"] = share if share <= 1 else None
