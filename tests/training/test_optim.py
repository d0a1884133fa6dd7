"""The schedule worked by hand, and which parameter gets which rate and decay."""

import pytest
import torch

from bertforge.columns.encoder import TabularConfig
from bertforge.lora.inject import inject_lora
from bertforge.training.config import LoraRecipe
from bertforge.training.optim import lr_scale, make_optimizer, set_lr
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


def groups(model, lr, head_lr, weight_decay):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["peak"], group["weight_decay"])
        for group in make_optimizer(model, lr, head_lr, weight_decay).param_groups
        for parameter in group["params"]
    }


def test_heads_may_have_a_rate_of_their_own_and_biases_do_not_decay():
    model = tiny_bert(tabular=TabularConfig.of(numeric=2, bins=3, hidden_size=3))
    found = groups(model, lr=1e-3, head_lr=1e-2, weight_decay=0.1)
    assert len(found) == len(list(model.parameters()))
    assert found["classifier.weight"] == found["tabular.mix.0.weight"] == (1e-2, 0.1)
    assert found["tabular.numeric.weight"] == (1e-2, 0.1)
    assert found["classifier.bias"] == found["tabular.numeric.bias"] == (1e-2, 0)
    assert found["bert.pooler.dense.weight"] == (1e-3, 0.1)
    assert found["bert.embeddings.LayerNorm.weight"] == found["bert.pooler.dense.bias"] == (1e-3, 0)


def test_a_step_moves_every_group_by_its_own_share_of_its_peak():
    model = tiny_bert()
    optimizer = make_optimizer(model, lr=1e-3, head_lr=1e-2, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(optimizer, 0.25)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # AdamW's first step is the learning rate, whatever the gradient; float32 rounds weights of 1 to 6e-8.
        rate = 1e-2 if name.startswith("classifier.") else 1e-3
        torch.testing.assert_close(
            before[name] - parameter, torch.full_like(parameter, 0.25 * rate), atol=1.2e-7, rtol=0
        )


def test_frozen_weights_are_not_optimized():
    model = tiny_bert()
    inject_lora(model, LoraRecipe(r=2).config(2, ("classifier",)))
    found = groups(model, lr=1e-3, head_lr=1e-3, weight_decay=0.1)
    assert all("lora_" in name or name.startswith("classifier.") for name in found)
    assert sum("lora_A" in name for name in found) == 4
