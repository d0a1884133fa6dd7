"""The most memory that a piece of work held, from a mark on."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")  # Linux: its VmHWM is the most that was resident
_RESET = Path("/proc/self/clear_refs")  # 5 written here sets VmHWM back, says proc(5)


class PeakMemory:
    """On a GPU what tensors take there; on a CPU the whole process, Python and the libraries included."""

    def __init__(self, device: torch.device) -> None:
        """Sets the mark; what nothing refers to any more is freed first."""
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        elif _RESET.exists():
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps most of what was freed
                trim(0)
            _RESET.write_text("5")

    def gb(self) -> float | None:
        """GB of 10^9 bytes since the mark; None on a CPU whose system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _RESET.exists() else None
        return int(found[1]) * 1024 / 1e9 if found else None
