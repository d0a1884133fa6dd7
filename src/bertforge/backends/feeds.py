"""A padded batch as the named arrays that a graph of ours takes."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from bertforge.batch import PackedBatch, PaddedBatch


def feeds(batch: PaddedBatch | PackedBatch, names: Container[str]) -> dict[str, np.ndarray]:
    """The inputs among `names`, as `export.bert_onnx` declares them."""
    assert isinstance(batch, PaddedBatch)
    tensors = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.tabular is not None:
        tensors |= batch.tabular
    return {name: tensor.numpy() for name, tensor in tensors.items() if name in names}
