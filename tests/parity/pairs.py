"""A transformers model, ours with the same weights, batches to give both, and what counts as equal.

Equal means within 1e-5 of the tensor's largest entry in float32, which carries 1.2e-7: sums in another order were seen
to move an entry of the logits by up to 3e-6 of the largest, and of a gradient by up to 1.05e-5, for our last layer
computes first tokens only (2-core CPU, torch 2.13). So whole models' gradients are compared in float64, within 1e-11.
The tiny models are drawn with a standard deviation of 0.5, not BERT's 0.02, so
that attention is far from uniform and a mistake anywhere moves the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bertforge.batch import PaddedBatch
from bertforge.model.classifier import BertForSequenceClassification

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11}
LENGTHS = (1, 2, 3, 17, 64, 511, 512)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def tiny_model(**changes: Any) -> transformers.BertForSequenceClassification:
    """A random transformers model in eval mode, small enough to run 512 tokens in milliseconds."""
    values = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.5,
    } | changes
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**values))
    for name, parameter in model.named_parameters():
        # transformers starts biases at 0 and LayerNorms at 1, where a forgotten one would go unseen.
        if name.endswith("bias") or "LayerNorm" in name:
            nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.1)
    return model.eval()


def ours_from(theirs: transformers.PreTrainedModel, directory: Path) -> BertForSequenceClassification:
    """Our model from what transformers' `save_pretrained` wrote into `directory`."""
    theirs.save_pretrained(directory)
    return BertForSequenceClassification.from_pretrained(directory)


def random_batch(lengths: tuple[int, ...], vocab_size: int, side: str = "right") -> PaddedBatch:
    """Sequences of these lengths with random ids and token types; the same ones for either padding side."""
    draw = torch.Generator().manual_seed(len(lengths))
    longest = max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]  # [batch, seq]
    real = real.flip(1) if side == "left" else real
    ids = torch.zeros(real.shape, dtype=torch.int64)
    types = torch.zeros_like(ids)
    ids[real] = torch.randint(1, vocab_size, (sum(lengths),), generator=draw)
    types[real] = torch.randint(0, 2, (sum(lengths),), generator=draw)
    return PaddedBatch(ids, real.long(), types)


def their_logits(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """What a transformers or PEFT model says of `batch`."""
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
    ).logits
    return logits


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed weighted sum of `logits`, by parameter name, for every parameter that is trained."""
    model.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equal(ours: Tensor, theirs: Tensor, name: str = "logits", scale: float | None = None) -> None:
    """Whole tensors, within their type's tolerance of the largest entry of `theirs` (or of `scale`)."""
    limit = TOLERANCES[theirs.dtype] * (theirs.abs().max().item() if scale is None else scale)
    difference = (ours - theirs).abs().max().item()
    assert ours.shape == theirs.shape, f"{name}: {ours.shape} and {theirs.shape}"
    assert difference <= limit, f"{name} differs by {difference:.2e}, allowed are {limit:.2e}"


def assert_equal_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every parameter's gradient, under the same names."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # Softmax ignores what is added to all its scores, so a key's bias has gradient 0 and rounding errors are all
        # there is to see: they are held against the query's.
        beside = theirs[name.replace("key.bias", "query.bias")] if name.endswith("key.bias") else gradient
        assert_equal(ours[name], gradient, name, scale=beside.abs().max().item())
