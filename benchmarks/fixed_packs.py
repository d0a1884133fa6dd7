"""Packs filled up to one shape, which a compiled model and a recorded CUDA graph ask for."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.loader import PackShape
from bertforge.engines.base import BatchShape
from bertforge.hardware import Hardware
from bertforge.model.classifier import BertForSequenceClassification


class FixedPacks:
    """A model on packs filled up to one shape."""

    name, precision, packed, streams = "pytorch", "bf16", True, 2
    SHORTEST = 32  # tokens a sequence has on average in the pack of the shortest ones; more of them do not fit

    def __init__(self, model: BertForSequenceClassification, max_length: int, tokens: int, hardware: Hardware) -> None:
        self.model, self.target, self.device = model, hardware.device, hardware.name
        self.max_length, self.shape = max_length, BatchShape(tokens, rows=tokens // self.SHORTEST)
        self.form = PackShape(tokens, tokens // self.SHORTEST + -(-tokens // max_length), tokens)
        self.lock = threading.Lock()  # one pack on the GPU; the next one is laid out meanwhile

    @torch.inference_mode()
    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Engine`."""
        assert isinstance(batch, PackedBatch)
        filled, _ = self.form.fill(batch, torch.zeros(len(batch), dtype=torch.int64), self.max_length)
        with self.lock:
            found: np.ndarray = self.launch(filled)[: len(batch)].cpu().numpy()
        return found

    def launch(self, batch: PackedBatch) -> Tensor:
        """Logits `[sequences, labels]` on the device."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held but the model."""


class Compiled(FixedPacks):
    """By torch.compile."""

    def launch(self, batch: PackedBatch) -> Tensor:
        if not hasattr(self, "compiled"):
            self.compiled = torch.compile(self.model, dynamic=False)
        logits: Tensor = self.compiled(batch.to(self.target))
        return logits


class Recorded(FixedPacks):
    """Recorded as a CUDA graph."""

    def launch(self, batch: PackedBatch) -> Tensor:
        if not hasattr(self, "graph"):
            self.record(batch)
        for static, value in zip(self.batch.tensors(), batch.tensors(), strict=True):
            static.copy_(value)
        self.graph.replay()
        return self.found

    def record(self, batch: PackedBatch) -> None:
        self.batch = batch.to(self.target)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.model(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = self.model(self.batch)
