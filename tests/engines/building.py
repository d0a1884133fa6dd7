"""An engine of a model, built and opened as `compile` does it."""

from dataclasses import replace

import torch

from bertforge.engines.base import Order
from bertforge.engines.registry import TARGETS
from bertforge.hardware import detect

CPU = replace(detect(), device=torch.device("cpu"))


def built(target, model, folder, precision="fp32", *, hardware=CPU, exact=False, **order):
    """The engine of `model` that `target` builds in `folder`; `order` are more fields of `Order`."""
    kind = TARGETS[target]
    longest = model.config.max_position_embeddings
    kind.build(folder, Order(precision=precision, model=model, longest=longest, **order), hardware)
    return (kind.exact if exact else kind.open)(folder, precision, hardware)
