"""PyTorch on packed batches: the reference, and the engine where nothing was compiled.

In bf16 on CUDA the encoder is a copy whose weights are bfloat16, for autocast turns every weight to bfloat16 again at
each call; the head and the columns stay float32. Padded batches are to compare.

On a CPU a kernel is generated for each new shape and kept, up to a thousand of them: after 1,000 calls with texts of
all lengths a process of 0.45 GB had 2.3. So packs there are filled up to sizes an eighth of a power of two apart.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.loader import PackShape
from bertforge.engines.base import BatchShape
from bertforge.engines.receipt import Product
from bertforge.errors import UsageError
from bertforge.hardware import Hardware, autocast
from bertforge.model.classifier import BertForSequenceClassification


class PyTorchEngine:
    """A model of ours in evaluation mode."""

    name = "pytorch"

    def __init__(
        self, model: BertForSequenceClassification, hardware: Hardware, precision: str, *, packed: bool = True
    ) -> None:
        """`precision` is fp32 or bf16: weights on CUDA, autocast on a CPU."""
        self.hardware, cuda = hardware, hardware.device.type == "cuda"
        self.packed = packed
        self.model = model.to(hardware.device).eval()
        self.cast = precision if not cuda else "fp32"
        if cuda and precision == "bf16":
            self.model = bfloat16_copy(self.model)
        # A GPU works on one pack while the next is laid out; large packs, for launching takes as long for small ones.
        tokens, self.streams = (65_536, 2) if cuda else (16_384, 1)
        self.shape = BatchShape(tokens, multiple=1 if packed else 8)
        self.target = hardware.device
        self.device, self.precision = hardware.name, precision

    @torch.inference_mode()
    def logits(self, batch: PaddedBatch | PackedBatch) -> np.ndarray:
        """See `base.Engine`."""
        rows = None
        if self.target.type == "cpu" and isinstance(batch, PackedBatch):
            rows, batch = len(batch), _filled(batch)
        with autocast(self.target, self.cast):
            found: np.ndarray = self.model(batch.to(self.target)).float().cpu().numpy()
        return found[:rows]

    def beside(self, model: BertForSequenceClassification) -> PyTorchEngine:
        """See `base.Host`: each weight that is equal here is the same memory from then on."""
        other = PyTorchEngine(model, self.hardware, self.precision, packed=self.packed)
        own = self.model.state_dict()
        for name, tensor in (*other.model.named_parameters(), *other.model.named_buffers()):
            if name in own and torch.equal(own[name], tensor):
                tensor.data = own[name]
        words = (engine.model.bert.embeddings.word_embeddings.weight.data_ptr() for engine in (self, other))
        if len({*words}) > 1:
            raise UsageError("its embeddings are not the engine's: one of both was trained in full")
        return other

    def products(self, batch: PaddedBatch | PackedBatch) -> list[Product]:
        """None are told: nothing was compiled."""
        return []

    def close(self) -> None:
        """Nothing is held but the model."""


def _filled(batch: PackedBatch) -> PackedBatch:
    """With sequences of [PAD] behind its own, and empty ones behind these."""
    used = batch.input_ids.numel()
    tokens = _rounded(used, 16)
    fillers = -(-(tokens - used) // batch.max_seqlen)
    shape = PackShape(tokens, _rounded(len(batch) + fillers, 1), tokens)
    filled, _ = shape.fill(batch, torch.zeros(len(batch), dtype=torch.int64), batch.max_seqlen)
    return filled


def _rounded(size: int, least: int) -> int:
    """Up to a multiple of an eighth of the power of two below it, or of `least`."""
    step = max(least, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def bfloat16_copy(model: BertForSequenceClassification) -> BertForSequenceClassification:
    """For speed alone, never for a checkpoint: encoder and pooler in bfloat16, head and columns as they were."""
    copied = copy.deepcopy(model)
    copied.bert.to(torch.bfloat16)
    return copied
