"""Which epoch is kept."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bertforge.data.loader import Examples, Split
from bertforge.data.tokens import TokenStore
from bertforge.manifest import BEST
from bertforge.training.config import Recipe
from bertforge.training.loop import Trainer
from tests.model.tiny import tiny_bert

LABELS = np.arange(40) % 2
VALIDATION = np.arange(20, 40)


def answers(right, surety):
    """Logits `[20, 2]` of which so many are right, all equally sure."""
    sign = np.where(np.arange(20) < right, 1, -1) * (2 * LABELS[VALIDATION] - 1)
    return torch.from_numpy(np.stack([-sign, sign], axis=1) * surety / 2).float()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trains three epochs whose validation logits are given; returns the run's progress and each epoch's weights."""

    def train(*epochs):
        examples = Examples(TokenStore(np.arange(200) % 49 + 1, np.arange(41) * 5), LABELS, sep_id=2, max_length=5)
        recipe = Recipe(epochs=len(epochs), lr=1e-3, max_length=5)
        trainer = Trainer(tiny_bert(), Split(examples, np.arange(20), VALIDATION), recipe, tmp_path, "fp32")
        given, weights = iter(epochs), []

        def validation_logits(trainer):
            weights.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
            return next(given)

        monkeypatch.setattr(Trainer, "validation_logits", validation_logits)
        return trainer.fit(lambda progress, sequences, loss: None), weights, trainer.model

    return train


def test_the_epoch_that_is_best_once_calibrated_is_kept_though_it_is_too_sure(tmp_path, trained):
    progress, weights, model = trained(answers(14, 0.8), answers(17, 8.0), answers(12, 0.5))
    epochs = [point for point in progress.history if "epoch" in point]
    plain = [point["epoch/validation_loss"] for point in epochs]
    assert np.argmin(plain) == 0, "the plain loss would keep another one"
    assert progress.best_epoch == 2 == 1 + np.argmin([point["epoch/calibrated_loss"] for point in epochs])
    assert progress.best_loss == epochs[1]["epoch/calibrated_loss"] < min(plain)
    kept = load_file(tmp_path / BEST)
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[1][name])
        assert torch.equal(value, kept[name])
    assert not torch.equal(weights[1]["classifier.weight"], weights[2]["classifier.weight"])


def test_of_equal_epochs_the_first_is_kept(trained):
    assert trained(answers(15, 1.0), answers(15, 1.0))[0].best_epoch == 1


def test_epochs_run_to_the_end_unless_patience_is_set(trained):
    assert trained(answers(17, 2.0), *[answers(12, 2.0)] * 5)[0].epoch == 6
