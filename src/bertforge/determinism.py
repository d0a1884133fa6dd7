"""One seed for everything, and generators that depend on a name instead of on what ran before."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and asks torch for algorithms whose reruns are bitwise equal."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # cuBLAS reads this once, when its first handle is made:
    # https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("error")
    # That mode also fills every fresh tensor with NaN, to expose reads of what was never written: a debugging aid that
    # costs a pass over all activations.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made at run time


def generator(*names: int | str) -> np.random.Generator:
    """A NumPy generator that depends on `names` alone, e.g. `generator(seed, "shuffle", epoch)`."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def branch(rank: int) -> None:
    """Gives process `rank` a stream of torch's own, which follows from where the stream of process 0 stands now.

    Called where all processes stand alike. Process 0 goes on as if it were alone.
    """
    if rank == 0:
        return
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in states) + str(rank).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]))
