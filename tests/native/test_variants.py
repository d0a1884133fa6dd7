"""Weights of one model in the place of another's: what graphs read stays where it lies, and holds what is asked."""

import pytest
import torch

from bertforge.engines.native import run_once
from bertforge.errors import UsageError
from bertforge.native.network import Network
from bertforge.native.plain import PlainOperations
from bertforge.native.variants import Variants
from bertforge.native.weights import NativeWeights, flat
from tests.native.models import adapted, model, pack


@torch.inference_mode()
def logits(network):
    return run_once(network, pack())


def test_each_computes_what_its_own_weights_do_in_any_order():
    models = [adapted(1), adapted(2, ("query", "value", "dense")), model()]
    wanted = [logits(Network(NativeWeights.of(each, None), PlainOperations(rounding=True))) for each in models]
    assert (wanted[0] - wanted[1]).abs().max() > 0.1
    weights = NativeWeights.of(models[2], None)
    network, places = Network(weights, PlainOperations(rounding=True)), [t.data_ptr() for _, t in flat("", weights)]
    variants = Variants(weights)
    given = [variants.of(models[0]), variants.of(models[1]), variants.own]
    assert given[0].keys() < given[1].keys()
    for turn in (0, 1, 0, 2, 1, 2, 2, 0):
        variants.put(given[turn])
        assert torch.equal(logits(network), wanted[turn])
    assert [t.data_ptr() for _, t in flat("", weights)] == places
    again = variants.of(models[0])  # made while it is in place already
    assert again.keys() == given[0].keys()
    assert all(torch.equal(again[name], given[0][name]) for name in again)


def test_only_what_differs_is_held_again():
    variants = Variants(NativeWeights.of(model(), None))
    found = variants.of(adapted(1))
    assert set(found) == {
        *(f"layers.{i}.qkv.weight" for i in range(3)),
        "head.classifier.weight",
        "head.classifier.bias",
    }
    assert variants.own.keys() == found.keys()


def test_a_model_that_is_no_adapter_of_the_base_is_refused():
    variants = Variants(NativeWeights.of(model(), None))
    with pytest.raises(UsageError, match="its embeddings are not the engine's"):
        variants.of(model(seed=1))
    with pytest.raises(UsageError, match=r"other shapes than the engine \(head.classifier"):
        variants.of(model(labels=("a", "b", "c")))
    other = model()
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.bias += 1
    with pytest.raises(UsageError, match=r"it changes layers.0.qkv.bias, which the engine's graphs have fixed"):
        variants.of(other)
