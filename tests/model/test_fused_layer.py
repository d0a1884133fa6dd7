"""The layer written out by hand is the layer of modules: values, every gradient, with adapters, for first tokens.

On a GPU it runs in bfloat16 as training does, elsewhere in float32: in Triton's interpreter, and by the CPU's kernels.
"""
# ruff: noqa: E402  # what the interpreter needs is set before the imports

import copy
import os
from dataclasses import replace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, and then a kernel, is imported
pytest.importorskip("triton", reason="the kernels need triton, which comes with torch for CUDA: pip install triton")

from bertforge.batch import PackedBatch
from bertforge.errors import UsageError
from bertforge.kernels.attention import Bounds
from bertforge.kernels.layer_norm import Norm
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora
from bertforge.model.attention import PackedCore
from bertforge.model.encoder import BertLayer, multiply_in_fp8
from bertforge.model.fused_layer import FP8_PLACES, NAMES, FrozenCasts, fused_layer
from tests.kernels.e4m3 import round_as_hardware_does
from tests.model.tiny import tiny_bert, tiny_config

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# ||ours - exact|| / ||exact|| of the output and of gradients. Float32 carries 1e-7; bfloat16 rounds every result to
# 4e-3. GELU is fitted to 3e-5, and its slopes are kept to 0.0025, which moves a gradient by a thousandth or two.
EXACT, FITTED, ROUGH = (2e-2, 2e-2, 2e-2) if CUDA else (2e-6, 3e-5, 4e-3)
KERNELS = pytest.mark.parametrize("triton", [True] if CUDA else [True, False], ids=lambda on: "triton" if on else "cpu")
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "initializer_range": 0.2}
CU_SEQLENS = torch.tensor([0, 5, 5, 17, 20, 20], dtype=torch.int32, device=DEVICE)  # two sequences are empty


def layer_of(**changes):
    torch.manual_seed(0)
    layer = BertLayer(tiny_config(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes))
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer.to(DEVICE)


def run(layer, fused, *, triton=True, first=False, dropout_p=0.0, keep=True, fp8=False):
    """Output, and gradients of the hidden states and of every trained parameter, by name."""
    layer.zero_grad()
    torch.manual_seed(1)
    hidden = torch.randn(20, 64, device=DEVICE).to(DTYPE if fused else torch.float64).requires_grad_()
    core = PackedCore(Bounds(CU_SEQLENS, CU_SEQLENS), 12)
    core, queries = core.first(hidden) if first else (core, None)
    if fused:
        settings = replace(layer.settings(layer.weights()), dropout_p=dropout_p, keep=keep, triton=triton)
        if fp8:
            settings = replace(settings, fp8=layer.fp8_weights(layer.weights()))
        output = fused_layer(hidden, queries, core.bounds, settings, layer.weights())
    else:
        output = layer(hidden, core, queries)
    if keep:
        grad = torch.randn(output.shape, device=DEVICE)
        real = torch.tensor([[True], [False], [True], [True], [False]], device=DEVICE) if first else 1
        output.backward((grad * real).to(output.dtype))  # an empty sequence's result means nothing
    if first:
        output = output[CU_SEQLENS.diff() > 0]
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), "hidden": hidden.grad, **found}


def exact(layer, **options):
    return run(layer.double().cpu() if not CUDA else layer.double(), False, **options)


def assert_same(ours, theirs, triton):
    tolerance = ROUGH if triton else EXACT  # the CPU's kernels keep no slopes
    output = FITTED if triton else EXACT
    assert (ours["output"].double() - theirs["output"]).norm() <= output * theirs["output"].norm()
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # A key's bias has gradient 0 but for rounding: softmax ignores what is added to all its scores.
        beside = theirs[name.replace("key.bias", "query.bias")] if name.endswith("key.bias") else expected
        assert (ours[name].double() - expected).norm() <= tolerance * beside.norm(), name


@KERNELS
@pytest.mark.parametrize("first", [False, True], ids=["all tokens", "first tokens"])
@pytest.mark.parametrize(
    "trained", [("",), (), ("output.dense",), ("LayerNorm",), ("query.weight", "value.bias")], ids=str
)
def test_values_and_gradients_are_those_of_the_modules(trained, first, triton):
    layer = layer_of()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    ours = run(layer, True, first=first, triton=triton)
    assert_same(ours, exact(layer, first=first), triton)


@KERNELS
def test_an_adapter_gets_the_gradients_it_gets_from_the_modules(triton):
    model = tiny_bert(**SHAPE)
    inject_lora(model, LoraConfig(r=2, target_modules=("query", "value", "intermediate.dense")))
    layer = model.bert.encoder.layer[0].to(DEVICE).eval()
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ours = run(layer, True, triton=triton)
    assert sum("lora_" in name for name in ours) == 6
    assert_same(ours, exact(layer), triton)


def test_adapters_with_dropout_and_other_linears_are_left_to_the_modules():
    model = tiny_bert(**SHAPE)
    assert model.bert.encoder.layer[0].weights() is not None
    inject_lora(model, LoraConfig(lora_dropout=0.1))
    assert model.train().bert.encoder.layer[0].weights() is None
    assert model.eval().bert.encoder.layer[0].weights() is not None

    class Own(torch.nn.Linear):
        pass

    layer = layer_of()
    layer.output.dense = Own(96, 64)
    assert layer.weights() is None
    assert len(layer_of().weights()) == 2 * len(NAMES)


def test_a_frozen_layer_below_which_nothing_is_trained_differentiates_nothing():
    layer = layer_of().requires_grad_(False)
    core = Bounds(CU_SEQLENS, CU_SEQLENS)
    output = fused_layer(
        torch.randn(20, 64, device=DEVICE, dtype=DTYPE), None, core, layer.settings(layer.weights()), layer.weights()
    )
    assert not output.requires_grad


@KERNELS
@pytest.mark.parametrize("first", [False, True], ids=["all tokens", "first tokens"])
def test_without_a_backward_pass_the_values_are_the_same(first, triton):
    layer = layer_of()
    kept, not_kept = (run(layer, True, first=first, keep=keep, triton=triton) for keep in (True, False))
    assert torch.equal(not_kept["output"], kept["output"])


def test_frozen_weights_are_cast_once_and_again_when_they_change():
    casts, layer = FrozenCasts(), layer_of()
    weight = layer.output.dense.weight
    assert casts(0, weight, torch.float16) is weight, "trained weights are cast at each step, by the layer"
    weight.requires_grad_(False)
    first = casts(0, weight, torch.float16)
    assert first.dtype == torch.float16
    assert casts(0, weight, torch.float16) is first
    weight.mul_(2)
    assert torch.equal(casts(0, weight, torch.float16), weight.half())
    weight.data = weight.data + 1
    assert torch.equal(casts(0, weight, torch.float16), weight.half())
    other = torch.nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    assert not casts(0, other, torch.float16).any()
    with torch.inference_mode():
        copied = copy.deepcopy(casts)(0, weight, torch.float16)
    assert copied is not first
    assert not copied.is_inference()


@KERNELS
def test_dropout_follows_torchs_seed(triton):
    layer = layer_of()
    plain, one, two = (run(layer, True, dropout_p=p, triton=triton) for p in (0.0, 0.3, 0.3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (one["output"] - plain["output"]).abs().max() > 0.1


@pytest.mark.skipif(CUDA, reason="differences are taken in float32")
@KERNELS
@pytest.mark.parametrize("first", [False, True], ids=["all tokens", "first tokens"])
def test_with_dropout_gradients_are_those_of_the_masks_that_were_drawn(first, triton):
    layer = layer_of()
    torch.manual_seed(2)
    hidden = torch.randn(20, 64, requires_grad=True)
    settings = replace(layer.settings(layer.weights()), dropout_p=0.3, keep=True, triton=triton)
    weighing = torch.randn(5 if first else 20, 64)
    weighing[[1, 4] if first else []] = 0.0  # empty sequences mean nothing

    def weighed():
        torch.manual_seed(3)
        core = PackedCore(Bounds(CU_SEQLENS, CU_SEQLENS), 12)
        core, queries = core.first(hidden) if first else (core, None)
        return (fused_layer(hidden, queries, core.bounds, settings, layer.weights()) * weighing).sum()

    # Below both dropouts, between them, and above.
    for part in (hidden, layer.attention.self.value.weight, layer.intermediate.dense.weight, layer.output.dense.bias):
        (gradient,) = torch.autograd.grad(weighed(), part)
        direction = gradient / gradient.norm()  # the steepest, where float32 shows a difference best
        with torch.no_grad():
            part += 1e-2 * direction
            ahead = weighed()
            part -= 2e-2 * direction
            behind = weighed()
            part += 1e-2 * direction
        assert (ahead - behind).item() / 2e-2 == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_the_two_dropouts_of_a_layer_draw_apart(monkeypatch):
    seeds = []
    monkeypatch.setattr("bertforge.model.fused_layer.Norm", lambda *parts: seeds.append(int(parts[4])) or Norm(*parts))
    run(layer_of(), True, dropout_p=0.3)
    assert len(seeds) == len(set(seeds)) == 2


def test_nothing_is_dropped_in_evaluation():
    layer = BertLayer(tiny_config(**SHAPE, hidden_dropout_prob=0.2))
    assert layer.train().settings(layer.weights()).dropout_p == 0.2
    assert layer.eval().settings(layer.weights()).dropout_p == 0.0


def adapted(targets=("query", "value"), **changes):
    """A tiny model with adapters that do something."""
    model = tiny_bert(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    torch.manual_seed(0)
    inject_lora(model, LoraConfig(r=2, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(DEVICE)


# ||ours - exact|| / ||exact||. Each operand in e4m3 is 0.026 off; the output has gone through four, a gradient through
# those, four more and attention.
FP8_OUTPUT, FP8_GRADIENT = 0.06, 0.15


@pytest.mark.parametrize("first", [False, True], ids=["all tokens", "first tokens"])
def test_products_in_fp8_move_values_and_gradients_by_their_rounding(first, monkeypatch):
    round_as_hardware_does(monkeypatch)
    layer = adapted().bert.encoder.layer[0].eval()
    ours = run(layer, True, first=first, fp8=True)
    plain = run(layer, True, first=first)
    theirs = exact(layer, first=first)
    assert ours.keys() == theirs.keys()
    assert sum("lora_" in name for name in ours) == 4
    for name, expected in theirs.items():
        error = (ours[name].double() - expected).norm() / expected.norm()
        assert error < (FP8_OUTPUT if name == "output" else FP8_GRADIENT), name
        assert error > (plain[name].double() - expected).norm() / expected.norm(), f"{name}: nothing was in 8 bits"


def test_in_fp8_a_trained_norm_and_dropout_are_as_without(monkeypatch):
    round_as_hardware_does(monkeypatch)
    layer = layer_of()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("LayerNorm" in name or "query" in name)
    ours, theirs = (run(layer, True, dropout_p=0.3, fp8=fp8) for fp8 in (True, False))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() < FP8_GRADIENT * expected.norm(), name


def test_the_weights_in_fp8_are_those_of_the_feed_forward():
    layer = adapted().bert.encoder.layer[0]
    weights = layer.weights()
    short = layer.fp8_weights(weights)
    linears = (layer.intermediate.dense, layer.output.dense)
    for copied, linear in zip((short.intermediate, short.output), linears, strict=True):
        assert (copied.rows.float() * copied.scale - linear.weight).norm() < 0.03 * linear.weight.norm()
    assert [weights[place + 1] is linear.bias for place, linear in zip(FP8_PLACES, linears, strict=True)] == [True] * 2
    assert layer.fp8_weights(weights).output is short.output, "made once"
    with torch.no_grad():
        layer.output.dense.weight.mul_(2)
    assert layer.fp8_weights(weights).output.scale == 2 * short.output.scale


def test_fp8_is_for_layers_whose_feed_forward_is_frozen_and_refused_where_there_are_none():
    model = adapted()
    multiply_in_fp8(model)
    layer = model.bert.encoder.layer[0]
    for training in (True, False):
        assert (layer.train(training).settings(layer.weights()).fp8 is not None) == training
    assert all(layer.fp8 for layer in model.bert.encoder.layer)
    model = adapted()
    model.bert.encoder.layer[1].output.dense.bias.requires_grad_(True)
    multiply_in_fp8(model)
    assert [layer.fp8 for layer in model.bert.encoder.layer] == [True, False]
    for targets in (("query", "output.dense"), ("intermediate.dense",)):
        with pytest.raises(UsageError, match="this recipe trains every layer's"):
            multiply_in_fp8(adapted(targets))
    with pytest.raises(UsageError, match="trains every layer's"):
        multiply_in_fp8(tiny_bert(**SHAPE, attention_probs_dropout_prob=0.0))


def test_fp8_is_refused_where_the_layer_would_be_computed_by_its_modules():
    for changes in ({"hidden_act": "relu"}, {"attention_probs_dropout_prob": 0.1}, {"num_attention_heads": 8}):
        model = tiny_bert(**SHAPE | {"attention_probs_dropout_prob": 0.0} | changes)
        with pytest.raises(UsageError, match="precision=fp8 needs GELU, heads of 32 or 64"):
            multiply_in_fp8(inject_lora(model, LoraConfig(r=2)))
    model = tiny_bert(**SHAPE, attention_probs_dropout_prob=0.0)
    with pytest.raises(UsageError, match=r"set attention_dropout=0 and lora.lora_dropout=0"):
        multiply_in_fp8(inject_lora(model, LoraConfig(r=2, lora_dropout=0.1)))


@pytest.mark.skipif(not CUDA, reason="a model takes the fused layer on CUDA")
def test_a_model_told_to_multiplies_in_fp8_in_training_alone():
    model = adapted()
    ids = torch.arange(20, device=DEVICE)
    batch = PackedBatch(ids, torch.zeros_like(ids), CU_SEQLENS[[0, 1, 3, 4]], 12)
    with torch.autocast("cuda", torch.bfloat16):
        plain = model.train()(batch)
        multiply_in_fp8(model)
        assert not torch.equal(model(batch), plain)
        assert torch.equal(model.eval()(batch), plain), "there is no dropout"


@pytest.mark.skipif(CUDA, reason="a CPU's rule")
def test_a_cpu_takes_it_in_bfloat16_while_training_and_gets_the_modules_gradients():
    layer = layer_of()
    for parameter in layer.parameters():
        parameter.data = parameter.bfloat16().float()
    hidden = torch.randn(20, 64).bfloat16().float().requires_grad_()
    core = PackedCore(Bounds(CU_SEQLENS, CU_SEQLENS), 12)

    def gradients():
        output = layer(hidden, core)
        return output, *torch.autograd.grad(output.float().square().sum(), [hidden, layer.output.dense.weight])

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, *found = gradients()
        assert type(output.grad_fn).__name__ == "_FusedLayerBackward"
        with torch.no_grad():
            assert layer(hidden, core).dtype == torch.float32, "the modules' LayerNorm"
    assert [tensor.dtype for tensor in (output, *found)] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, exactly in zip((output, *found), expected, strict=True):
        assert (ours - exactly).norm() < 2e-2 * exactly.norm()
