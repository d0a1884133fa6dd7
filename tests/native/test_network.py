"""The forward pass: with nothing rounded it is the model, and with the kernels' rounding as far off as simulated."""

import pytest
import torch

from bertforge.engines.native import run_once
from bertforge.native.choices import Choices
from bertforge.native.network import Network
from bertforge.native.plain import PlainOperations
from bertforge.native.weights import NativeWeights
from bertforge.proof.simulation import BESIDE, layers_of, rounded, sixteen_bits
from bertforge.proof.tolerances import STRUCTURE
from tests.native.models import LENGTHS, model, pack, ranges

FORMS = ["bf16", "int8", "fp8"]
needs_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with all types"
)


def copied(bert, form, **options):
    """The weights, and the ranges among them."""
    scales = None if form == "bf16" else ranges(bert, form, **options)
    return NativeWeights.of(bert, scales), scales


@torch.inference_mode()
def logits(weights, operations, batch):
    return run_once(Network(weights, operations), batch)


@torch.inference_mode()
def stored(bert, form, scales, batch):
    """The model with the weights as they are stored, and activations cut."""
    short = [] if scales is None else layers_of(bert, scales)
    others = [name for name in (*layers_of(bert), *BESIDE) if name not in short]
    with (
        rounded(bert, form, short, scales, activations=False),
        rounded(bert, "bf16", others, activations=False),
    ):
        return bert(batch)


def spread(found):
    return float((found - found.mean(0)).std())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("form", FORMS)
def test_with_nothing_rounded_it_is_the_model_with_its_stored_weights(form, activation):
    bert = model(hidden_act=activation)
    weights, scales = copied(bert, form, smooth=True) if form != "bf16" else copied(bert, form)
    wanted = stored(bert, form, scales, pack())
    found = logits(weights, PlainOperations(rounding=False), pack())
    assert (found - wanted).abs().max() < STRUCTURE * spread(wanted)
    with torch.inference_mode():
        assert (bert(pack()) - wanted).abs().max() > 10 * STRUCTURE * spread(wanted), "nor is it the plain model"


@pytest.mark.parametrize("form", FORMS)
def test_rounding_moves_it_as_far_as_the_simulation_says(form):
    bert = model()
    weights, scales = copied(bert, form)
    names = [] if scales is None else layers_of(bert, scales)
    with torch.inference_mode():
        plain = bert(pack())
        with rounded(bert, form, names, scales), sixteen_bits(bert, "bf16", names):
            simulated = float((bert(pack()) - plain).square().mean().sqrt())
    found = float((logits(weights, PlainOperations(rounding=True), pack()) - plain).square().mean().sqrt())
    assert simulated / 3 < found < 3 * simulated


def test_parts_of_a_model_may_be_in_8_bits():
    bert = model()
    spared = ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.2.output.dense"]
    weights, scales = copied(bert, "int8", but=spared)
    wanted = stored(bert, "int8", scales, pack())
    found = logits(weights, PlainOperations(rounding=False), pack())
    assert (found - wanted).abs().max() < STRUCTURE * spread(wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_pack_may_end_in_empty_sequences_and_tokens_of_none(form):
    bert = model()
    weights, _ = copied(bert, form)
    network, batch = Network(weights, PlainOperations(rounding=True)), pack()
    alone = logits(weights, PlainOperations(rounding=True), batch)
    tokens, sequences = sum(LENGTHS) + 9, len(LENGTHS) + 3
    ids, positions = (torch.zeros(tokens, dtype=torch.int32) for _ in range(2))
    ids[: sum(LENGTHS)], positions[: sum(LENGTHS)] = batch.input_ids, batch.position_ids
    bounds = torch.full((sequences + 1,), sum(LENGTHS), dtype=torch.int32)
    bounds[: len(LENGTHS) + 1] = batch.cu_seqlens
    with torch.inference_mode():
        room = network.room(tokens + 5, sequences + 2)  # more than it takes
        filled = network(ids, positions, bounds, room)[: len(LENGTHS)]
    assert torch.allclose(filled, alone, atol=1e-5)


@needs_a_gpu
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_are_as_far_off_as_the_plain_operations(form):
    from bertforge.native.operations_triton import TritonOperations

    bert = model()
    scales = None if form == "bf16" else ranges(bert, form)
    with torch.inference_mode():
        exact = bert(pack())
    device = torch.device("cuda", 0)
    bert.to(device)
    weights = NativeWeights.of(bert, scales)
    choices = Choices.known(torch.cuda.get_device_name())
    found = logits(weights, TritonOperations.on(device, choices), pack()).cpu()
    plain = logits(weights, PlainOperations(rounding=True), pack()).cpu()
    allowed = float((plain - exact).square().mean().sqrt())
    assert float((found - exact).square().mean().sqrt()) < 3 * allowed
