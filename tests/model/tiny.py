"""A BERT of ours that is small enough for a test to build in a millisecond."""

from typing import Any

import torch

from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig


def tiny_config(**changes: Any) -> BertConfig:
    values = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "initializer_range": 0.5,
    }
    return BertConfig(**values | changes)


def tiny_bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    """In eval mode, so that only what a test changes changes the logits."""
    torch.manual_seed(seed)
    return BertForSequenceClassification.from_config(tiny_config(**changes)).eval()
