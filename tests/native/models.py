"""A BERT that the GPU engine computes, small enough for a test, its 8-bit ranges and a pack."""

import numpy as np
import torch

from bertforge.batch import PackedBatch
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora, merge
from bertforge.model.points import linears, shared, units
from bertforge.scales import Scales
from tests.model.tiny import tiny_bert

LENGTHS = (5, 1, 20, 32, 7)


def model(**changes):
    """Two heads of 32, three layers."""
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "initializer_range": 0.2} | changes
    return tiny_bert(**values)


def adapted(seed, targets=("query", "value"), **changes):
    """`model` with a merged adapter and a head of its own."""
    plain = model(**changes)
    torch.manual_seed(seed)
    whole = inject_lora(plain, LoraConfig(r=2, lora_alpha=4, target_modules=targets, modules_to_save=("classifier",)))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "lora_B" in name or name.startswith("classifier"):
                parameter.normal_()
    return merge(whole).eval()


def pack(lengths=LENGTHS, vocabulary=50, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(0, vocabulary, (sum(lengths),))
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return PackedBatch(ids, positions, bounds, max(lengths))


@torch.no_grad()
def ranges(bert, form, *, smooth=False, but=()):
    """The largest value of each linear layer's input on `pack`, times 0.9, so that some are cut; `but` are left out."""
    every = units(bert.config, "projections")
    chosen = [unit for unit in every if not set(unit.points) & set(but)]
    names = linears(chosen)
    largest = {}

    def watch(name):
        def hook(module, inputs):
            largest[name] = 0.9 * float(inputs[0].abs().max())

        return bert.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    bert(pack())
    for handle in handles:
        handle.remove()
    factors = {}
    if smooth:
        for name in names:
            width = bert.get_submodule(name).in_features
            factors[name] = np.exp2(np.arange(width) % 3 - 1).astype(np.float32)
            largest[name] *= 2
    return Scales(form, shared(chosen, largest), smooth=factors)
