"""How fast a matrix product is here and now: behind the choice of a precision, and under every share of a ceiling.

The numbers multiplied are random: a GPU that multiplies ones draws less power, and so keeps a higher clock than any
model lets it (He 2024, https://www.thonking.ai/p/strangely-matrix-multiplications). They come from a generator of their
own, so that timing leaves the caller's random state as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def product_seconds(device: str, precision: str, shape: tuple[int, int, int], measure_s: float) -> float:
    """Seconds of one product in `precision`: the fastest of two or more, for other work can only slow one down.

    `shape` is rows, inner and columns of `[rows, inner] x [inner, columns]`. After a first one to warm up, products
    follow until `measure_s` seconds have gone into them.
    """
    product = _product(device, precision, shape)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < measure_s:
        start = time.perf_counter()
        product()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _product(device: str, precision: str, shape: tuple[int, int, int]) -> Callable[[], object]:
    """The product of a matrix and a transposed one, as a linear layer multiplies with its weight."""
    rows, inner, columns = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inner, device=device, generator=generator)
    weight = torch.randn(columns, inner, device=device, generator=generator)
    if precision == "int8":
        return partial(torch._int_mm, (16 * x).to(torch.int8), (16 * weight).to(torch.int8).t())
    if precision == "fp8":
        left, right = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        scale = torch.ones((), device=device)
        return partial(torch._scaled_mm, left, right.t(), scale, scale, out_dtype=torch.bfloat16)
    dtype = _TYPES[precision]
    return partial(torch.mm, x.to(dtype), weight.to(dtype).t())
