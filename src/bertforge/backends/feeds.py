"""A padded batch as the named arrays that a graph of ours takes."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from bertforge.batch import PackedBatch, PaddedBatch


def feeds(batch: PaddedBatch | PackedBatch, names: Container[str]) -> dict[str, np.ndarray]:
    """The inputs among `names`, int64, as `export.bert_onnx` declares them."""
    assert isinstance(batch, PaddedBatch)
    arrays = {"input_ids": batch.input_ids.numpy(), "attention_mask": batch.attention_mask.numpy()}
    return {name: array for name, array in arrays.items() if name in names}
