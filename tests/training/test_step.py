"""One step's loss by hand: class weights, label smoothing, clipping."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bertforge.data.loader import Examples, Split
from bertforge.data.tokens import TokenStore
from bertforge.training.config import Recipe
from bertforge.training.distributed import ALONE, World
from bertforge.training.loop import Trainer
from bertforge.training.optim import make_optimizer, set_lr
from bertforge.training.step import EagerStep, GraphedStep
from tests.model.tiny import tiny_bert

LABELS = np.array([0, 0, 0, 1, 0, 1, 1, 0])


def examples():
    ids = np.random.default_rng(0).integers(1, 50, size=8 * 5)
    return Examples(TokenStore(ids, np.arange(9) * 5), LABELS, sep_id=2, max_length=5)


def trainer(folder, **settings):
    split = Split(examples(), np.arange(6), np.arange(6, 8))  # four rows of class 0 and two of class 1 to train on
    return Trainer(tiny_bert(), split, Recipe(tokens_per_step=40, max_length=5, **settings), folder, "fp32")


def by_hand(model, batch, labels, weights, smoothing):
    """torch documents: (1 - s) of the weighted mean, and s spread over the classes, both over the sum of weights."""
    with torch.no_grad():
        surprise = -model(batch).double().log_softmax(1).numpy()
    own = weights[labels]
    nll = (own * surprise[np.arange(len(labels)), labels]).sum() / own.sum()
    spread = (surprise * weights).sum() / own.sum() / len(weights)
    return (1 - smoothing) * nll + smoothing * spread


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("balance", "weights"), [("none", [1, 1]), ("balanced", [6 / (2 * 4), 6 / (2 * 2)])])
def test_the_loss_by_hand(tmp_path, balance, weights, smoothing):
    made = trainer(tmp_path, class_weights=balance, label_smoothing=smoothing)
    assert made.step.class_weights.tolist() == weights
    rows = np.arange(4)  # balanced weights of all six train rows sum to their number; those of these four do not
    batch, labels = examples().pack(rows)
    expected = by_hand(made.model, batch, LABELS[rows], np.array(weights), smoothing)
    plain = by_hand(made.model, batch, LABELS[rows], np.ones(2), 0)
    assert made.step(batch, labels).item() == pytest.approx(expected, rel=1e-6)
    assert (expected != pytest.approx(plain, rel=1e-4)) == (balance == "balanced" or smoothing > 0)


def step_of(model, most, precision):
    return EagerStep(model, make_optimizer(model, 2e-5, 2e-5, 0.01), torch.ones(2), 0.0, most, precision)


def test_gradients_are_clipped_and_not_carried_over():
    model, (batch, labels) = tiny_bert(), examples().pack(np.arange(6))

    def norm(most):
        step_of(model, most, "fp32").backward(batch, labels)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()

    whole = norm(1e9)
    assert norm(1e9) == whole, "a second step starts from none"
    assert norm(whole / 2) == pytest.approx(whole / 2, rel=1e-4)


def test_in_bf16_the_weights_and_their_gradients_stay_fp32():
    model, (batch, labels) = tiny_bert(), examples().pack(np.arange(6))
    rounded = step_of(model, 1.0, "bf16").backward(batch, labels)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    exact = step_of(model, 1.0, "fp32").backward(batch, labels)
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)
    assert rounded.item() != exact.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_holds_the_sums_over_processes():
    def steps(world):
        model = tiny_bert(hidden_size=128, intermediate_size=128).cuda()
        optimizer = make_optimizer(model, 2e-5, 2e-5, 0.01)
        step = GraphedStep(EagerStep(model, optimizer, torch.tensor([1.0, 3.0]).cuda(), 0.1, 1.0, "bf16", world))
        losses = []
        for rows in (np.arange(4), np.arange(4, 8)):
            batch, labels = examples().pack(rows)
            losses.append(step(batch.to("cuda"), labels.cuda()).item())
        step.release()
        return losses, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    losses, gradients = steps(World(rank=0, size=2))  # sums over the one process there is, through NCCL
    dist.destroy_process_group()
    alone, expected = steps(ALONE)
    assert losses == alone
    assert losses[0] != losses[1]
    assert torch.equal(gradients, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_moves_the_weights_as_an_eager_one_does():
    """Bit for bit, at the learning rate of the step, and not while it is recorded."""

    def weights(graphed, scales):
        torch.manual_seed(0)
        model = tiny_bert(hidden_size=128, intermediate_size=128, attention_probs_dropout_prob=0.0).cuda().train()
        optimizer = make_optimizer(model, 1e-2, 1e-2, 0.01)
        eager = EagerStep(model, optimizer, torch.ones(2).cuda(), 0.0, 1.0, "bf16")
        step = GraphedStep(eager) if graphed else eager
        for number, scale in enumerate(scales):
            batch, labels = examples().pack(np.arange(4) + 4 * (number % 2))
            set_lr(optimizer, scale)
            step(batch.to("cuda"), labels.cuda())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    found = weights(True, (1.0, 0.5, 0.25))
    assert torch.equal(found, weights(False, (1.0, 0.5, 0.25)))
    assert not torch.equal(found, weights(True, (1.0, 0.5, 0.5)))
