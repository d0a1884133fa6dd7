"""Injecting, freezing and merging, on BERT and on a module that is not one."""

import copy

import pytest
import torch
from torch import nn

from bertforge.batch import PaddedBatch, pack
from bertforge.columns.encoder import TabularConfig
from bertforge.errors import ArtifactError, UsageError
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora, merge, unmerged
from bertforge.lora.layer import LoraLinear
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from bertforge.training.config import load_recipe
from tests.model.tiny import tiny_bert

BATCH = PaddedBatch(torch.arange(1, 25).view(2, 12), torch.ones(2, 12, dtype=torch.int64))
ALL_LINEARS = ("query", "key", "value", "dense")


def adapted_bert(config=None, **changes):
    """A tiny BERT whose adapters have been moved off their start, where B = 0."""
    model = inject_lora(tiny_bert(**changes), config or LoraConfig())
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_B.weight, std=0.1)
    return model


def adapted_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_a_fresh_adapter_changes_nothing():
    assert torch.equal(inject_lora(tiny_bert(), LoraConfig())(BATCH), tiny_bert()(BATCH))


def test_the_default_adapts_query_and_value_of_every_layer():
    assert adapted_layers(inject_lora(tiny_bert(), LoraConfig())) == [
        f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")
    ]


def test_a_target_is_the_end_of_a_name_at_a_dot():
    model = inject_lora(tiny_bert(), LoraConfig(target_modules=("attention.output.dense",)))
    assert adapted_layers(model) == [f"bert.encoder.layer.{layer}.attention.output.dense" for layer in (0, 1)]
    with pytest.raises(UsageError, match="'ery'"):
        inject_lora(tiny_bert(), LoraConfig(target_modules=("ery",)))


def test_any_linear_layer_can_be_adapted_the_head_aside():
    model = inject_lora(tiny_bert(), LoraConfig(target_modules=ALL_LINEARS))
    linears = [name for name, module in tiny_bert().named_modules() if isinstance(module, nn.Linear)]
    assert sorted(adapted_layers(model)) == sorted(set(linears) - {"classifier"})


def test_a_subset_of_layers():
    model = adapted_bert(LoraConfig(layers_to_transform=(1, 3)), num_hidden_layers=4)
    assert {name.split(".")[3] for name in adapted_layers(model)} == {"1", "3"}


def test_a_model_that_is_no_bert():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
    inject_lora(model, LoraConfig(r=2, target_modules=("0",), modules_to_save=("2",)))
    assert adapted_layers(model) == ["0"]
    assert trainable(model) == 2 * (4 + 5) + 10


def test_only_the_adapters_and_the_head_learn():
    model = adapted_bert(LoraConfig(target_modules=ALL_LINEARS))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(BATCH).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {name for name in before if ".lora_A." in name or ".lora_B." in name or name.startswith("classifier.")}
    assert changed == expected
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_the_tabular_branch_learns_when_it_is_to_be_saved():
    config = LoraConfig(modules_to_save=("classifier", "tabular"))
    tabular = TabularConfig.of(numeric=2, categorical=(3,), bins=4, embedding_size=2, hidden_size=3)
    model = inject_lora(tiny_bert(tabular=tabular), config)
    assert all(parameter.requires_grad for parameter in model.tabular.parameters())
    assert not any("tabular" in name for name in adapted_layers(model))
    frozen = inject_lora(tiny_bert(tabular=tabular), LoraConfig())
    assert not any(parameter.requires_grad for parameter in frozen.tabular.parameters())


def test_dropout_acts_in_training_only():
    # The rest of the model draws none, and an adapter put into a model in eval mode is in eval mode.
    model = adapted_bert(LoraConfig(lora_dropout=0.5), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert torch.equal(model(BATCH), model(BATCH))
    model.train()
    assert not torch.equal(model(BATCH), model(BATCH))
    assert torch.equal(model.eval()(BATCH), model(BATCH))


def test_alpha_over_r_scales_the_update():
    weak, strong = (adapted_bert(LoraConfig(r=4, lora_alpha=alpha)) for alpha in (4, 12))
    for one, other in zip(weak.modules(), strong.modules(), strict=True):
        if isinstance(one, LoraLinear):
            other.load_state_dict(one.state_dict())
            torch.testing.assert_close(other.delta(), 3 * one.delta())


@pytest.mark.parametrize("layout", [lambda batch: batch, pack], ids=["padded", "packed"])
@pytest.mark.parametrize("targets", [("query", "value"), ALL_LINEARS], ids=["query, value", "all linears"])
def test_merged_equals_unmerged_and_differs_from_the_base(targets, layout):
    config = LoraConfig(target_modules=targets, lora_dropout=0.1)
    model = adapted_bert(config)
    merged = merge(model)
    batch = layout(BATCH)
    unmerged = model(batch)
    # Relative to the largest logit: the sums are the same in another order.
    assert (merged(batch) - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
    assert (tiny_bert()(batch) - unmerged).abs().max() > 0.1


@pytest.mark.parametrize("layout", [lambda batch: batch, pack], ids=["padded", "packed"])
def test_merged_weights_compute_what_the_branches_do(layout):
    """In float64 only the rounding of the merged weights is left; twice the scale is far from it."""
    model, batch = adapted_bert(LoraConfig(target_modules=ALL_LINEARS)), layout(BATCH)
    apart = unmerged(model)(batch)
    assert apart.dtype == torch.float64
    assert (merge(model).double()(batch) - apart).abs().max() <= 1e-6 * apart.abs().max()
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.scaling *= 2
    assert (merge(model).double()(batch) - apart).abs().max() > 0.1 * apart.abs().max()


def test_a_branch_by_hand():
    """A is 2 x 3 and B 4 x 2, so that a product in the other order has no shape."""
    model = inject_lora(nn.Sequential(nn.Linear(3, 4)), LoraConfig(2, 6, 0.5, ("0",), modules_to_save=()))
    layer, x = model[0], torch.randn(5, 3, dtype=torch.float64)
    nn.init.normal_(layer.lora_B.weight)
    weight, bias, a, b = (
        tensor.detach().double()
        for tensor in (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A.weight, layer.lora_B.weight)
    )
    found = unmerged(model.eval())(x)
    torch.testing.assert_close(found, x @ weight.T + bias + 3 * (x @ a.T) @ b.T)
    assert layer.lora_A.weight.dtype == torch.float32, "the model itself stays as it was"
    assert not torch.allclose(found, x @ weight.T + bias)


def test_the_merged_model_is_plain_and_trainable_and_the_adapted_one_stays(tmp_path):
    model = adapted_bert()
    before = copy.deepcopy(model.state_dict())
    logits = model(BATCH)
    merged = merge(model)
    assert merged.state_dict().keys() == tiny_bert().state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(BATCH), logits)
    merge(model).save_pretrained(tmp_path)
    torch.testing.assert_close(BertForSequenceClassification.from_pretrained(tmp_path)(BATCH), logits)


def test_merging_is_in_float32_whatever_the_base_holds():
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    model = inject_lora(nn.Sequential(layer), LoraConfig(r=2, target_modules=("0",), modules_to_save=()))
    nn.init.normal_(model[0].lora_B.weight, std=1e-3)  # an update bfloat16 would round away
    merged = merge(model)[0].weight
    assert merged.dtype == torch.float32
    assert torch.equal(merged, layer.weight.float() + model[0].delta())


def test_a_bfloat16_model_is_adapted_and_merged_to_float32():
    model = inject_lora(tiny_bert().bfloat16(), LoraConfig(target_modules=ALL_LINEARS))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_B.weight, std=0.1)
    found = model(BATCH)
    assert found.dtype == torch.bfloat16
    merged = merge(model)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    expected = merged(BATCH)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert (tiny_bert()(BATCH) - expected).abs().max() > 0.1 * expected.abs().max()


def test_a_damaged_adapter_is_not_merged():
    model = adapted_bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.lora_A.weight[0, 0] = float("inf")
    with pytest.raises(ArtifactError, match=r"layer\.1\.attention\.self\.value .* not finite"):
        merge(model)


def test_a_model_without_adapters_is_not_merged():
    with pytest.raises(ArtifactError, match="no adapters"):
        merge(tiny_bert())


MISTAKES = {
    "a target that matches nothing lists what could": (
        {"target_modules": ("query", "q_proj")},
        r"'q_proj' matches no linear layer; it could be attention\.output\.dense, attention\.self\.key, "
        r"attention\.self\.query, attention\.self\.value, bert\.pooler\.dense, intermediate\.dense, output\.dense$",
    ),
    "a module that is not linear": ({"target_modules": ("LayerNorm",)}, "'LayerNorm' matches no linear layer"),
    "the head, which is trained in full": ({"target_modules": ("classifier",)}, "'classifier' matches no linear layer"),
    "a layer the model lacks": ({"layers_to_transform": (1, 2)}, r"\[2\] are not layers of this model, .* 0 to 1$"),
    "targets outside the layers": (
        {"target_modules": ("pooler.dense",), "layers_to_transform": (0,)},
        r"pooler\.dense match no linear layer within layers_to_transform \[0\]",
    ),
    "no layers": ({"layers_to_transform": ()}, r"layers_to_transform \[\]"),
    "a module to save that is missing": (
        {"modules_to_save": ("score",)},
        r"'score' is not a module of this model; its parts are bert, dropout, classifier$",
    ),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_an_error_and_leaves_the_model_alone(options, message):
    model = tiny_bert()
    with pytest.raises(UsageError, match=message):
        inject_lora(model, LoraConfig(**options))
    assert adapted_layers(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_are_not_put_on_adapters():
    with pytest.raises(UsageError, match="holds adapters already; merge"):
        inject_lora(inject_lora(tiny_bert(), LoraConfig()), LoraConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"lora_alpha": 0}, "lora_alpha=0 is not a finite number above 0; twice r is usual, here 16"),
        ({"lora_alpha": -1}, "lora_alpha=-1 is not a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is not a finite number above 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf is not a finite number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"target_modules": ()}, "target_modules is empty"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_with_the_value(options, message):
    with pytest.raises(UsageError, match=message):
        LoraConfig(**options)


VARIANTS = {
    # The study's table: variant, its checkpoint's vocabulary, trainable parameters.
    "bert-base": (30_522, 109_483_778),
    "bert-overflow": (82_000, 149_018_882),
    "bert-base-tabular": (30_522, 109_483_788),
    "lora-r8": (30_522, 296_450),
    "lora-r1": (30_522, 38_402),
    "lora-r8-last-4": (30_522, 99_842),
}


@pytest.mark.parametrize(("name", "vocab_size", "expected"), [(name, *row) for name, row in VARIANTS.items()])
def test_the_six_variants_train_as_many_parameters_as_the_study_says(name, vocab_size, expected):
    recipe = load_recipe(name)
    tabular = recipe.tabular and TabularConfig.of(numeric=len(recipe.tabular.columns))  # joined directly
    with torch.device("meta"):  # shapes without memory
        model = BertForSequenceClassification(BertConfig(vocab_size=vocab_size, tabular=tabular))
    if recipe.lora:
        inject_lora(model, recipe.lora.config(12, ("classifier",)))
    assert trainable(model) == expected
