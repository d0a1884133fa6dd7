"""Two ways to hold a batch of sequences, and the way from one to the other.

Padded: every sequence as long as the longest, `[batch, seq]`, with a mask. What transformers and ONNX graphs take.
Packed: the sequences laid end to end, `[tokens]`, with `cu_seqlens` telling where each begins. Nothing is padding, so
every linear layer works on real tokens only; attention alone needs the boundaries. Three sequences of 2, 1 and 3
tokens are packed as

    input_ids     a a b c c c
    position_ids  0 1 0 0 1 2
    cu_seqlens    0   2 3     6
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


class _TensorFields:
    """What a dataclass of tensors (and of nested batches and dicts of tensors) can do as a whole."""

    def to(self, device: torch.device | str) -> Self:
        """A copy on `device`, made asynchronously where the memory is pinned."""
        return self.map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy in pinned host memory, from which a GPU can fetch while the CPU goes on."""
        return self.map(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Every tensor, nested ones too, in a fixed order."""
        found: list[Tensor] = []
        self.map(lambda value: found.append(value) or value)  # type: ignore[func-returns-value]
        return found

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `function` applied to every tensor."""
        mapped = {}
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = function(value)
            elif isinstance(value, _TensorFields):
                value = value.map(function)
            elif isinstance(value, dict):
                value = {name: function(tensor) for name, tensor in value.items()}
            mapped[field.name] = value
        return type(self)(**mapped)


@dataclass(frozen=True)
class LowerLayers(_TensorFields):
    """What the embeddings and the lowest encoder layers make of a pack; a model given it begins above them."""

    hidden: Tensor
    """[tokens, hidden]."""
    layers: int
    """How many layers that takes, the embeddings not counted."""


@dataclass(frozen=True)
class PaddedBatch(_TensorFields):
    """Sequences padded to one length. Hugging Face tokenizers' output fits: `PaddedBatch(**tokenizer(texts, ...))`."""

    input_ids: Tensor
    """[batch, seq] int64."""
    attention_mask: Tensor
    """[batch, seq]; nonzero where a token is real. Padding may stand on either side."""
    token_type_ids: Tensor | None = None
    """[batch, seq] int64; None means all zero."""
    tabular: dict[str, Tensor] | None = None
    """The columns beside the text, [sequences, width] for each kind of `columns.registry`, by its name."""


@dataclass(frozen=True)
class PackedBatch(_TensorFields):
    """Sequences laid end to end; see the module's example."""

    input_ids: Tensor
    """[tokens] int64."""
    position_ids: Tensor
    """[tokens] int64, restarting at 0 in each sequence."""
    cu_seqlens: Tensor
    """[sequences + 1] int32: where each sequence starts; the last entry is the number of tokens.

    Equal neighbours make an empty sequence, whose logits mean nothing: such fill the end of a pack of fixed shape."""
    max_seqlen: int
    """Tokens in the longest sequence."""
    token_type_ids: Tensor | None = None
    """[tokens] int64; None means all zero."""
    tabular: dict[str, Tensor] | None = None
    """The columns beside the text, [sequences, width] for each kind of `columns.registry`, by its name."""
    lower: LowerLayers | None = None
    """None leaves the lowest layers to the model."""

    def __len__(self) -> int:
        """Sequences in the pack."""
        return self.cu_seqlens.numel() - 1


def pack(batch: PaddedBatch) -> PackedBatch:
    """Drops the padding of `batch`, on whichever side it stands; positions count real tokens from 0.

    transformers counts positions from the left edge, padding included, so a left-padded batch gives it other logits
    than the same sequences padded on the right. Packed, both are the same.
    """
    mask = batch.attention_mask.bool()  # [batch, seq]
    lengths = mask.sum(dim=1)  # [batch]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    return PackedBatch(
        input_ids=batch.input_ids[mask],  # [tokens]
        position_ids=(mask.cumsum(1) - 1)[mask],  # [tokens]
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()),
        token_type_ids=None if batch.token_type_ids is None else batch.token_type_ids[mask],
        tabular=batch.tabular,
    )
