"""The processes that train one model together: `torchrun --nproc-per-node 2 -m bertforge train ...`.

Every process holds the whole model and works on its share of each pack. Gradients are summed, not averaged, so a step
is the one that a single process would take: the recipe means the same on any number of processes. Weights and the
optimizer's moments stay equal because all begin equal and add equal numbers.

Sums over gradients go through NCCL on GPUs, and a CUDA graph may hold them. What the processes agree on between steps
goes from host to host through gloo: it waits for no GPU, and it fails at once when a process is gone, where NCCL waits.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from bertforge.errors import ArtifactError, BertforgeError, MachineError

# What others may wait for: a slow disk under a checkpoint, a table that is tokenized first. A process that dies is
# noticed at once; this is for a machine that falls silent.
TIMEOUT = timedelta(minutes=10)
_TEXT = 1024  # bytes of a message between processes


class WorkerLostError(MachineError):
    """Another process is gone, or was not heard of for `TIMEOUT`."""


@dataclass(frozen=True)
class World:
    """This process among those that train together; alone, nothing here does or costs anything."""

    rank: int = 0
    """Number of this process; 0 writes and prints."""
    size: int = 1
    """Processes in all."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the processes, in place."""
        if self.size > 1:
            with _heard():
                dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Sums the gradients in `model` and the scalar `loss` over the processes, as one flat tensor; returns the loss.

        Every process must have gradients of the same parameters.
        """
        if self.size == 1:
            return loss
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        parts = [*(parameter.grad for parameter in parameters), loss]
        flat = self.sum(torch.cat([part.reshape(-1) for part in parts if part is not None]))
        sizes = [*(parameter.numel() for parameter in parameters), 1]
        *gradients, loss = flat.split(sizes)  # type: ignore[no-untyped-call]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return loss.view(())

    def gather(self, tensor: Tensor) -> Tensor:
        """`[processes, ...]` on the CPU: what each process gave, of one shape."""
        gathered = torch.empty(self.size, *tensor.shape, dtype=tensor.dtype)
        if self.size == 1:
            return gathered.copy_(tensor[None])
        with _heard():
            dist.all_gather(list(gathered), tensor.cpu())
        return gathered

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process raised it."""
        if self.size == 1:
            return flags
        return tuple(self.gather(torch.tensor(flags)).any(0).tolist())

    def texts(self, text: str) -> list[str]:
        """What each process says, cut to 1,024 bytes."""
        if self.size == 1:
            return [text]
        said = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
        gathered = self.gather(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in gathered]

    def check_same(self, text: str, what: str) -> None:
        """Raises ArtifactError when a process says something else than the first, of `what` it was to read."""
        said = self.texts(text)
        for rank, other in enumerate(said):
            if other != said[0]:
                raise ArtifactError(f"process {rank} reads {what} {other}, process 0 {said[0]}; give all the same")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What any process raises inside (of ours), every process raises after; nobody leaves before all are done.

        Nothing inside may wait for another process.
        """
        if self.size == 1:
            yield
            return
        found: BertforgeError | None = None
        try:
            yield
        except BertforgeError as error:
            found = error
        for told in filter(None, self.texts(f"{found.exit_code} {found}" if found else "")):
            code, _, message = told.partition(" ")
            raise found or _of(int(code), message)


ALONE = World()


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process, joined to others or not, is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun started this process in, or a world of one.

    An error that several processes raise is told by one: the others leave with its exit code (SystemExit).
    Raises MachineError when the processes do not find one another.
    """
    size = launched()
    if size == 1:
        yield ALONE
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise MachineError(f"the {size} processes do not find one another ({reason}); check --rdzv-endpoint") from error
    try:
        yield World(rank, size)
    except BertforgeError as error:
        if not _first_to_tell(store, str(error)):
            raise SystemExit(error.exit_code) from error
        raise
    except KeyboardInterrupt:
        if rank:
            raise SystemExit(130) from None
        raise
    else:  # after an error it might wait for a process that is gone
        dist.destroy_process_group()


@contextmanager
def _heard() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, dist.DistError) or "gloo" in reason or "Connection" in reason:
            with suppress(ValueError):  # outside the main thread
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would end this one before its word
            raise WorkerLostError("a worker died or fell silent") from error
        raise


def _first_to_tell(store: Any, message: str) -> bool:
    try:
        return bool(store.add(f"told/{message}", 1) == 1)
    except RuntimeError:  # the store went with its process
        return True


def _of(exit_code: int, message: str) -> BertforgeError:
    """An error of another process, as the kind that it was."""
    kinds = {kind.exit_code: kind for kind in BertforgeError.__subclasses__()}
    return kinds.get(exit_code, BertforgeError)(message)
