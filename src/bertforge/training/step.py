"""One training step: a pack in, the weights moved and the loss out; eager on a CPU, one replayed CUDA graph on a GPU.

A step of a small BERT is some 700 kernels of a few microseconds each, and launching one from Python takes longer than
that: run eagerly on all-MiniLM-L6-v2, an H100 works 5 ms of a step's 41 (measured 2026-11-23, packs of 8,192 tokens).
Packs of one shape let the whole step be recorded once and replayed with a single launch. Dropout stays random: a graph
draws its seeds from torch's generator at replay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertforge.batch import PackedBatch
from bertforge.data.loader import IGNORED
from bertforge.hardware import autocast
from bertforge.training.distributed import ALONE, World
from bertforge.training.graph import record


@dataclass(frozen=True)
class EagerStep:
    """Computes the mean loss over a pack's sequences, and moves the weights against its gradients.

    Where several processes share the pack, loss and gradients are those of the whole pack.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    class_weights: Tensor
    """[labels]."""
    label_smoothing: float
    max_grad_norm: float
    precision: str
    world: World = ALONE

    def __call__(self, batch: PackedBatch, labels: Tensor) -> Tensor:
        """The loss, a detached scalar on the device."""
        loss = self.backward(batch, labels)
        self.optimizer.step()
        return loss

    def backward(self, batch: PackedBatch, labels: Tensor) -> Tensor:
        """The loss; leaves its gradients, clipped to `max_grad_norm`, in the model's parameters."""
        for parameter in self.model.parameters():
            parameter.grad = None
        with autocast(labels.device, self.precision):
            logits = self.model(batch)
        summed = F.cross_entropy(
            logits.float(),
            labels,
            weight=self.class_weights,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        real = labels != IGNORED  # [sequences]
        # A weighted mean divides by the weights of the labels, as torch's own does; this one is of all processes.
        loss = summed / self.world.sum((self.class_weights[labels * real] * real).sum())
        loss.backward()  # type: ignore[no-untyped-call]
        mean = self.world.sum_gradients(self.model, loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm, foreach=True)
        return mean


class GraphedStep:
    """`EagerStep` recorded at its first pack; every later pack must have that one's shape."""

    def __init__(self, eager: EagerStep) -> None:
        self.eager = eager
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: PackedBatch, labels: Tensor) -> Tensor:
        """As `EagerStep`; the loss is a copy, for the next replay overwrites the graph's own."""
        if self.graph is None:
            self._record(batch, labels)
        for static, value in zip([*self.batch.tensors(), self.labels], [*batch.tensors(), labels], strict=True):
            static.copy_(value)
        assert self.graph is not None
        self.graph.replay()
        return self.loss.clone()

    def release(self) -> None:
        """Lets go of the graph: NCCL does not end while a graph holds work of it."""
        self.graph = None

    def _record(self, batch: PackedBatch, labels: Tensor) -> None:
        self.batch, self.labels = batch.map(Tensor.clone), labels.clone()
        self.graph, self.loss = record(
            lambda: self.eager(self.batch, self.labels),
            warm_up=lambda: self.eager.backward(self.batch, self.labels),  # moves no weights
        )
