"""The schedule worked by hand, and which parameter gets which rate and decay."""

import pytest

from bertforge.lora.inject import inject_lora
from bertforge.model.config import TabularConfig
from bertforge.training.config import LoraRecipe, Recipe
from bertforge.training.optim import lr_scale, make_optimizer
from tests.model.tiny import tiny_bert


def test_the_schedule_worked_by_hand():
    scales = [lr_scale(step, total_steps=10, warmup=0.2) for step in range(11)]
    assert scales == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])


@pytest.mark.parametrize("warmup", [0, 0.06, 0.5, 1])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_every_step_learns_at_most_at_the_peak(total, warmup):
    scales = [lr_scale(step, total, warmup) for step in range(total)]
    assert min(scales) > 0
    assert max(scales) == 1


def groups(recipe, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in make_optimizer(model, recipe).param_groups
        for parameter in group["params"]
    }


def test_heads_may_have_a_rate_of_their_own_and_biases_do_not_decay():
    model = tiny_bert(tabular=TabularConfig(numeric=2, bins=3, hidden_size=3))
    found = groups(Recipe(lr=1e-3, head_lr=1e-2, weight_decay=0.1), model)
    assert len(found) == len(list(model.parameters()))
    assert found["classifier.weight"] == found["tabular.mix.0.weight"] == (1e-2, 0.1)
    assert found["tabular.numeric.weight"] == (1e-2, 0.1)
    assert found["classifier.bias"] == found["tabular.numeric.bias"] == (1e-2, 0)
    assert found["bert.pooler.dense.weight"] == (1e-3, 0.1)
    assert found["bert.embeddings.LayerNorm.weight"] == found["bert.pooler.dense.bias"] == (1e-3, 0)
    assert groups(Recipe(lr=1e-3), model)["classifier.weight"][0] == 1e-3


def test_frozen_weights_are_not_optimized():
    model = tiny_bert()
    inject_lora(model, LoraRecipe(r=2).config(2, ("classifier",)))
    found = groups(Recipe(), model)
    assert all("lora_" in name or name.startswith("classifier.") for name in found)
    assert sum("lora_A" in name for name in found) == 4
