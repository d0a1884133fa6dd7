"""What this machine can do, asked once and passed on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from bertforge import threads
from bertforge.errors import MachineError, UsageError
from bertforge.matrix_product import product_seconds

PRECISIONS = ("auto", "fp32", "bf16")
TRAINING_PRECISIONS = (*PRECISIONS, "fp8")
_FEED_FORWARD = (2048, 384, 1536)  # tokens through the wider half of a small BERT's, the product that is timed
_SECONDS = 0.2  # of timing it in one precision


@dataclass(frozen=True)
class Hardware:
    """The device training and inference run on."""

    device: torch.device
    name: str
    """Product name of the GPU or the CPU."""
    memory_gb: float
    """Memory of the device, in GB of 10^9 bytes."""
    cores: int
    """CPU cores that work is spread over: see `threads.count`."""
    bf16: bool
    """The device multiplies bfloat16 matrices in hardware."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability of a GPU, such as (9, 0)."""


def detect() -> Hardware:
    """The first CUDA device (under torchrun, the one of this process), or else the CPU.

    Raises MachineError when torchrun started more processes here than there are GPUs.
    """
    cores = threads.count()
    if torch.cuda.is_available():
        index = _local_gpu(torch.cuda.device_count())
        properties = torch.cuda.get_device_properties(index)
        return Hardware(
            device=torch.device("cuda", index),
            name=properties.name,
            memory_gb=properties.total_memory / 1e9,
            cores=cores,
            bf16=properties.major >= 8,  # Ampere and later
            capability=(properties.major, properties.minor),
        )
    return Hardware(
        device=torch.device("cpu"),
        name=_cpu_name(),
        memory_gb=_host_memory_gb(),
        cores=cores,
        # The last one is False too where ONEDNN_MAX_CPU_ISA forbids these instructions.
        bf16=(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    )


def _local_gpu(count: int) -> int:
    """Number of this process's GPU of the `count` that this machine has."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > count:
        raise MachineError(
            f"{processes} processes on this machine, but {count} GPUs; torchrun --nproc-per-node {count}, "
            'or CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )
    return int(os.environ.get("LOCAL_RANK", "0"))


def choose_precision(hardware: Hardware, wanted: str = "auto") -> str:
    """`fp32` or `bf16`: what was asked for, or for `auto` bf16 where it is in hardware and, on a CPU, measured faster.

    Raises MachineError for bf16 on a device without it.
    """
    if wanted not in PRECISIONS:
        raise UsageError(f"precision={wanted} is not one of {', '.join(PRECISIONS)}")
    if wanted == "fp32" or (wanted == "auto" and not hardware.bf16):
        return "fp32"
    if not hardware.bf16:
        raise MachineError(f"precision=bf16, but {hardware.name} has no bfloat16 arithmetic; set precision=fp32")
    # Tile registers are always faster; AVX-512's instructions are on some CPUs, and a busy moment may hide it.
    if wanted == "bf16" or hardware.device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return "bf16"
    bf16, fp32 = (product_seconds("cpu", precision, _FEED_FORWARD, _SECONDS) for precision in ("bf16", "fp32"))
    return "bf16" if bf16 < 0.8 * fp32 else "fp32"


def choose_training_precision(hardware: Hardware, wanted: str = "auto") -> str:
    """As `choose_precision`, or `fp8`, which training alone knows: bf16, and a frozen feed-forward's products in e4m3.

    Raises MachineError for a precision that the device lacks.
    """
    if wanted != "fp8":
        return choose_precision(hardware, wanted)
    if hardware.capability is None or hardware.capability < (8, 9):
        raise MachineError(
            f"precision=fp8, but {hardware.name} has no FP8 arithmetic (NVIDIA GPUs have it from compute capability "
            "8.9 on: Ada, Hopper); set precision=auto"
        )
    return wanted


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a model computes in `precision`; its weights keep their own type.

    For fp8 that is bf16: what is in 8 bits, the model knows (`model.encoder.multiply_in_fp8`).
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision in ("bf16", "fp8"))


def free_host_bytes() -> int:
    """Memory that programs may still take, or all of it where the system does not say what is free."""
    free = int(_host_memory_gb() * 1e9)
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")  # a container's limit
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass
    return max(0, free)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _host_memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return 0.0
