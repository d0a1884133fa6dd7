"""Kernels that begin while the one before them ends ("programmatic dependent launch"), on Hopper and later.

Between two small kernels a GPU waits for a microsecond or two: the first one drains, the second one is launched. A
kernel that is launched early has that behind it when its input is ready, and can ask for its weights meanwhile.
"""

import torch
import triton
import triton.language as tl

OVERLAP_UP_TO = 512  # BERT-base, 128 tokens, H200: 0.44 ms a pass become 0.35; 65,536 tokens: 15.85 ms become 16.3


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Lets the next kernel be launched, and waits until what the last one has written can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(first, stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Asks for `[rows, columns]` elements at `first`, ROWS at most: they will be in the L2 cache when they are read."""
    line: tl.constexpr = 1024 // first.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    lines: tl.constexpr = COLUMNS // line if line < COLUMNS else 1
    row = tl.arange(0, ROWS)
    for start in range(0, columns, lines * line):
        column = start + line * tl.arange(0, lines)
        place = first + tl.where(row < rows, row, 0)[:, None] * stride + tl.where(column < columns, column, 0)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [place.to(tl.uint64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def overlaps(device: torch.device, tokens: int) -> bool:
    """Whether kernels on so many tokens are launched so: on larger packs they would take each other's room."""
    return tokens <= OVERLAP_UP_TO and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
