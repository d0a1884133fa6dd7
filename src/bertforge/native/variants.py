"""Several models of one base in the place of one: where they differ, weights are copied in when another is asked.

A recorded graph reads weights where they lay when it was recorded. So an adapter's merged matrices, which have the
shapes and types of those in use, are copied to these places, and every graph computes the adapted model from then on.
All else, the embeddings above all, is in memory once. Copying 24 matrices of BERT-base is 28 MB within the GPU's own
memory: some hundredths of a millisecond.

What a graph reads that was made of weights beforehand, the scales and biases of attention, no model may change.
"""

from __future__ import annotations

import torch

from bertforge.errors import UsageError
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.native.weights import NativeWeights, flat

Variant = dict[str, torch.Tensor]
"""What a model has in the place of the weights of these names."""
_FIXED = ("qkv.bias", ".scale", ".multiplier")


class Variants:
    """The weights of a network in bfloat16, and what is in their place. It is not for several threads at once."""

    def __init__(self, weights: NativeWeights) -> None:
        self.own: Variant = {}
        """The weights as they are, as far as some variant has others."""
        self._places, self._now = dict(flat("", weights)), self.own

    def of(self, model: BertForSequenceClassification) -> Variant:
        """Where a plain `model` differs; raises UsageError for one that is not of the same base and shape."""
        self.put(self.own)
        found = {}
        for name, tensor in flat("", NativeWeights.of(model, None)):
            place = self._places.get(name)
            if place is None or place.shape != tensor.shape:
                raise UsageError(f"it has other shapes than the engine ({name}), such as other labels or columns")
            if not torch.equal(place, there := tensor.to(place.device)):
                found[name] = there
        if "words" in found:
            raise UsageError("its embeddings are not the engine's: one of both was trained in full")
        if fixed := next((name for name in found if name.endswith(_FIXED)), None):
            raise UsageError(f"it changes {fixed}, which the engine's graphs have fixed; compile it: bertforge compile")
        self.own |= {name: self._places[name].clone() for name in found.keys() - self.own.keys()}
        return found

    def put(self, variant: Variant) -> None:
        """Copies `variant` into place, unless it is there; what the last one had elsewhere becomes the own again."""
        if variant is self._now:
            return
        for name in self._now.keys() | variant.keys():
            self._places[name].copy_(variant.get(name, self.own[name]))
        self._now = variant
