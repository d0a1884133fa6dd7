"""The most memory that a piece of work held, from a mark on: every figure of peak memory is read here.

On a CPU that is the whole process, Python and the libraries included. Linux's VmHWM counts this process alone, where
getrusage begins with what its parent held. On a GPU there are two answers: what torch's tensors took, and what the
process took of the device's free memory, for engines that allocate beside torch. Frameworks keep what they once took,
so the second is a peak too.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # a hundred MB, which no process shall have in its figure that does without

_STATUS = Path("/proc/self/status")  # its VmHWM is the most that was resident
_RESET = Path("/proc/self/clear_refs")  # 5 written here sets VmHWM back, says proc(5)


def resident_gb() -> float | None:
    """GB of 10^9 bytes this process held at most, since the last mark or since it began; None where it is not told."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else None


class PeakMemory:
    """A mark on `device`, and what was held since; GB are of 10^9 bytes."""

    def __init__(self, device: torch.device) -> None:
        """Sets the mark; what nothing refers to any more is freed first."""
        gc.collect()
        self.device = device
        if device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.free = torch.cuda.mem_get_info(device)[0]
        elif _RESET.exists():
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps most of what was freed
                trim(0)
            _RESET.write_text("5")

    def gb(self) -> float | None:
        """What tensors took on a GPU, or the process on a CPU; None on a CPU whose system sets no mark."""
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resident_gb() if _RESET.exists() else None

    def taken_gb(self) -> float | None:
        """What the process took of a GPU's free memory, tensors or not; on a CPU what it held, since it began where no
        mark can be set."""
        if self.device.type == "cuda":
            import torch

            return (self.free - torch.cuda.mem_get_info(self.device)[0]) / 1e9
        return resident_gb()
