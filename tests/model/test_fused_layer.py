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

from bertforge.kernels.attention import Bounds
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora
from bertforge.model.attention import PackedCore
from bertforge.model.encoder import BertLayer
from bertforge.model.fused_layer import NAMES, FrozenCasts, fused_layer
from tests.model.tiny import tiny_bert, tiny_config

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# ||ours - exact|| / ||exact|| of the output and of gradients. Float32 carries 1e-7; bfloat16 rounds every result to
# 4e-3. GELU's slopes are kept to 0.0025, which moves a gradient by a thousandth or two.
EXACT, ROUGH = (2e-2, 2e-2) if CUDA else (2e-6, 4e-3)
KERNELS = pytest.mark.parametrize("triton", [True] if CUDA else [True, False], ids=lambda on: "triton" if on else "cpu")
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "initializer_range": 0.2}
CU_SEQLENS = torch.tensor([0, 5, 5, 17, 20, 20], dtype=torch.int32, device=DEVICE)  # two sequences are empty


def layer_of(**changes):
    torch.manual_seed(0)
    layer = BertLayer(tiny_config(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes))
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer.to(DEVICE)


def run(layer, fused, *, triton=True, first=False, dropout_p=0.0, keep=True):
    """Output, and gradients of the hidden states and of every trained parameter, by name."""
    layer.zero_grad()
    torch.manual_seed(1)
    hidden = torch.randn(20, 64, device=DEVICE).to(DTYPE if fused else torch.float64).requires_grad_()
    core = PackedCore(Bounds(CU_SEQLENS, CU_SEQLENS), 12)
    core, queries = core.first(hidden) if first else (core, None)
    if fused:
        settings = replace(layer.settings(), dropout_p=dropout_p, keep=keep, triton=triton)
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
    assert (ours["output"].double() - theirs["output"]).norm() <= min(tolerance, EXACT) * theirs["output"].norm()
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
    output = fused_layer(torch.randn(20, 64, device=DEVICE, dtype=DTYPE), None, core, layer.settings(), layer.weights())
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
