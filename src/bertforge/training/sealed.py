"""Tensors that a run keeps while it trains: one safetensors file that shows damage.

safetensors itself checks no value. So the digest of all names, types, shapes and values, of what is said beside them
and of the run's `running.json` stands in the file's header: another run's file is refused as well. The file is replaced
atomically, and no pickle is involved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from bertforge.artifact import write_atomic
from bertforge.errors import ArtifactError, removal
from bertforge.manifest import RUNNING


def write_tensors(path: Path, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    """Writes `tensors`, from any device, and `said`, which JSON can hold."""
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(said)
    write_atomic(path, to_bytes(stored, metadata={"said": text, "digest": _digest(stored, text, path.parent)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote; raises ArtifactError when the file is missing or anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            header = file.metadata()
        text = header["said"]
        if _digest(tensors, text, path.parent) != header["digest"]:
            raise ValueError("its digest is another: it was changed, or is of another run")
        return tensors, json.loads(text)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(
            f"{path} is missing or damaged ({reason}); start the run anew: {removal(path.parent)}, then "
            "`bertforge train` without --resume"
        ) from error


def _digest(tensors: dict[str, Tensor], text: str, run: Path) -> str:
    running = run / RUNNING
    found = xxhash.xxh3_128(running.read_bytes() if running.is_file() else b"")
    found.update(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
