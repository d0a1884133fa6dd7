"""Checkpoints: safetensors or a legacy `.bin` in, safetensors out, strict about every key.

Spellings that older checkpoints use and what they mean here:

- `LayerNorm.gamma`, `LayerNorm.beta` (TensorFlow's names): `weight`, `bias`
- no `bert.` prefix (an encoder saved by itself): `bert.` is put before
- `bert.embeddings.position_ids` (a buffer that transformers saved until 4.31), `cls.*` (pretraining heads): left out
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from bertforge.artifact import write_atomic
from bertforge.errors import ArtifactError
from bertforge.models import weights_file

WEIGHTS = "model.safetensors"
# What reads the labels and the columns out of the encoder.
TASK_HEADS = ("classifier.", "tabular.")
# Parts a pretrained encoder may lack; each is loaded whole or made new.
_HEADS = ("bert.pooler.", *TASK_HEADS)


def load(model: nn.Module, directory: Path, drop: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Loads the checkpoint in `directory` into `model`, the heads `drop` ("classifier.") aside.

    Returns the heads left as they were in `model`, and those among them that the checkpoint holds but were dropped.
    Raises ArtifactError naming every missing, unexpected and misshapen key.
    """
    stored = {name: tensor for key, tensor in read(directory).items() if (name := _current_name(key))}
    found = {name: tensor for name, tensor in stored.items() if not name.startswith(drop)}
    wanted = model.state_dict()
    new = [head for head in _HEADS if not any(name.startswith(head) for name in found)]
    missing = [name for name in wanted if name not in found and not name.startswith(tuple(new))]
    unexpected = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} is {list(tensor.shape)}, the model needs {list(wanted[name].shape)}"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if missing or unexpected or misshapen:
        problems = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
        listed = "; ".join(f"{problem}: {_abbreviate(names)}" for problem, names in problems.items() if names)
        raise ArtifactError(f"the weights in {directory} do not fit its config.json: {listed}")
    model.load_state_dict(found, strict=False)  # copies into the model's float32
    dropped = [head for head in drop if any(name.startswith(head) for name in stored)]
    new = [head for head in new if any(name.startswith(head) for name in wanted)]
    return [head.rstrip(".") for head in new], [head.rstrip(".") for head in dropped]


def read(directory: Path) -> dict[str, Tensor]:
    """The tensors of `directory`'s checkpoint under the names the file uses."""
    path = weights_file(directory)
    try:
        return load_file(path) if path.name == WEIGHTS else _read_legacy(path)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(f"the weights in {directory} are damaged or cut short ({reason})") from error


def save(model: nn.Module, directory: Path) -> Path:
    """Writes `model.safetensors` in float32; raises ArtifactError for a model with adapters still in it."""
    state = model.state_dict()
    if adapters := [name for name in state if ".base_layer." in name]:
        raise ArtifactError(
            f"the model still holds {len(adapters)} adapted layers ({adapters[0]}, ...); merge them first: "
            "bertforge.merge(model), or save the adapter alone with save_adapter"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    return write_atomic(directory / WEIGHTS, to_bytes(tensors, metadata={"format": "pt"}))


def _read_legacy(path: Path) -> dict[str, Tensor]:
    advice = "convert it to safetensors with transformers' save_pretrained"
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ArtifactError(f"{path} holds more than tensors, or is damaged, and is not loaded: {advice}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ArtifactError(f"{path} holds more than a model's weights (a training state?) and is not loaded: {advice}")
    return tensors


def _current_name(key: str) -> str | None:
    """Today's name of a checkpoint's key, None for one this model has no use for."""
    if key.endswith("embeddings.position_ids") or key.startswith("cls."):
        return None
    if key.startswith(("embeddings.", "encoder.", "pooler.")):
        key = f"bert.{key}"
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if key.endswith(f"LayerNorm{old}"):
            key = key.removesuffix(old) + new
    return key


def _abbreviate(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
