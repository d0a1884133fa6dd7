"""Saving a run so that it goes on bit for bit, in one file of tensors (`sealed.py`).

It holds the trainable weights, AdamW's moments, the random number generators of every process and where the run stands.
The order of rows needs no saving: it depends on (seed, epoch) alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertforge.determinism import branch
from bertforge.errors import ArtifactError
from bertforge.training.distributed import ALONE, World
from bertforge.training.sealed import read_tensors, write_tensors


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    """Epochs finished."""
    step_in_epoch: int = 0
    """Optimizer steps finished in the epoch under way."""
    step: int = 0
    """Optimizer steps finished in all."""
    loss_sum: float = 0.0
    """Sum of the loss over the sequences of the epoch under way."""
    sequences: int = 0
    """Sequences seen in the epoch under way."""
    seconds: float = 0.0
    """Seconds of training, validation included."""
    train_seconds: float = 0.0
    """Seconds of training alone, up to the last loss that was read."""
    idle_seconds: float = 0.0
    """Seconds of those in which no step was at work."""
    best_epoch: int = 0
    """Epoch of the lowest validation loss after temperature scaling, from 1; 0 before the first."""
    best_loss: float = float("inf")
    """That loss."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What the curves show so far."""

    @property
    def idle(self) -> float:
        """Share of the training time in which no step was at work; NaN before the first loss is read."""
        return self.idle_seconds / self.train_seconds if self.train_seconds else float("nan")

    def add_time(self, idle: float, whole: float) -> float:
        """Counts `whole` seconds of training, `idle` of them without a step; returns their share."""
        self.idle_seconds += idle
        self.train_seconds += whole
        return idle / whole


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, world: World = ALONE
) -> None:
    """Called by every process; the first writes the checkpoint beside `path` and renames it into place."""
    generators = {"rng.cpu": world.gather(torch.get_rng_state())}  # [processes, bytes]
    if torch.cuda.is_available():
        generators["rng.cuda"] = world.gather(torch.cuda.get_rng_state())
    if not world.first:
        return
    tensors = generators | {f"model.{name}": tensor for name, tensor in trainable(model).items()}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{index}.{name}"] = value
    state = asdict(progress) | {"best_loss": progress.best_loss if progress.best_epoch else None}
    write_tensors(path, tensors, state)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World = ALONE) -> Progress:
    """Loads a checkpoint into `model`, `optimizer` and the generators.

    Raises ArtifactError when it is damaged or does not fit.
    """
    tensors, state = read_tensors(path)
    load_trainable(model, {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}, path)
    for index, parameter in enumerate(_parameters(optimizer)):
        prefix = f"optimizer.{index}."
        # What was made before the first step stays where nothing was saved: a recorded graph must find it made.
        optimizer.state[parameter] |= {
            name.removeprefix(prefix): tensor.to(parameter.device)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
    same_size = len(tensors["rng.cpu"]) == world.size
    stream = world.rank if same_size else 0
    torch.set_rng_state(tensors["rng.cpu"][stream].clone())  # of a row that is a view, torch reads other bytes
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"][stream].clone())
    if not same_size:
        branch(world.rank)
    if state["best_loss"] is None:
        state["best_loss"] = float("inf")
    return Progress(**state)


def saved_step(path: Path) -> int:
    """Optimizer steps finished in the checkpoint at `path`, 0 where there is none."""
    if not path.is_file():
        return 0
    return int(read_tensors(path)[1]["step"])


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_trainable(model: nn.Module) -> int:
    """Parameters that training changes."""
    return sum(parameter.numel() for parameter in trainable(model).values())


def load_trainable(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copies `tensors` into the trainable parameters; raises ArtifactError when names or shapes differ."""
    parameters = trainable(model)
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ArtifactError(f"{source} belongs to another model or recipe; start the run anew without --resume")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
