"""PyTorch on packed batches: the reference, and the engine where nothing was compiled. Padded ones are to compare."""

from __future__ import annotations

import numpy as np
import torch

from bertforge.backends.base import BatchShape
from bertforge.backends.receipt import Product
from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.hardware import Hardware, autocast
from bertforge.model.classifier import BertForSequenceClassification


class PyTorchBackend:
    """A model of ours in evaluation mode."""

    name = "pytorch"
    streams = 1

    def __init__(
        self, model: BertForSequenceClassification, hardware: Hardware, precision: str, *, packed: bool = True
    ) -> None:
        """`precision` is fp32 or bf16 (autocast)."""
        self.packed = packed
        self.shape = BatchShape(tokens=16_384, multiple=1 if packed else 8)
        self.model = model.to(hardware.device).eval()
        self.target = hardware.device
        self.device, self.precision = hardware.name, precision

    @torch.inference_mode()
    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Backend`."""
        with autocast(self.target, self.precision):
            found: np.ndarray = self.model(batch.to(self.target)).float().cpu().numpy()
        return found

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """None are told: nothing was compiled."""
        return []

    def close(self) -> None:
        """Nothing is held but the model."""
