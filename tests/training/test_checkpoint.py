"""A checkpoint is one safetensors file that either goes on exactly or says in one line why it cannot."""

import json

import pytest
import torch
from safetensors import safe_open

from bertforge.errors import ArtifactError
from bertforge.training import checkpoint
from bertforge.training.checkpoint import Progress
from bertforge.training.optim import make_optimizer
from tests.model.tiny import tiny_bert


def stepped(seed=0, **changes):
    """A model and its optimizer after one step, so that there are moments to save."""
    model = tiny_bert(seed, **changes)
    optimizer = make_optimizer(model, 0.1, 0.1, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    model, optimizer = stepped()
    progress = Progress(epoch=1, step=7, best_epoch=1, best_loss=0.5, history=[{"step": 7, "train/loss": 0.1}])
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, model, optimizer, progress)
    return path, model, optimizer, progress


def state(model, optimizer):
    names = ("step", "exp_avg", "exp_avg_sq")
    return [*model.parameters(), *(optimizer.state[p][name] for p in model.parameters() for name in names)]


def test_everything_comes_back(saved):
    path, model, optimizer, progress = saved
    drawn = torch.rand(3)
    other, fresh = stepped(seed=1)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))
    torch.manual_seed(99)
    assert checkpoint.restore(path, other, fresh) == progress
    restored, expected = state(other, fresh), state(model, optimizer)
    assert len(restored) == len(expected) == 4 * len(list(model.parameters()))
    assert all(torch.equal(left, right) for left, right in zip(restored, expected, strict=True))
    assert torch.equal(torch.rand(3), drawn), "the generator goes on where it stood"


def test_before_the_first_epoch_there_is_no_best(tmp_path):
    model, optimizer = stepped()
    checkpoint.save(tmp_path / "c", model, optimizer, Progress(step=1))
    assert checkpoint.restore(tmp_path / "c", model, optimizer) == Progress(step=1)


def test_it_is_safetensors_with_json_in_its_header_and_no_pickle(saved):
    path = saved[0]
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"].keys() == {"said", "digest"}
    assert json.loads(header["__metadata__"]["said"])["step"] == 7
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert 8 + int.from_bytes(content[:8], "little") + end == len(content), "nothing but tensors follows"
    with safe_open(path, framework="pt") as file:
        assert "rng.cpu" in file.keys()  # noqa: SIM118  # not a dict


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:4],
        lambda content: b"\x80\x04K\x01." + content,  # a pickle
        lambda content: content.replace(b'"said"', b'"sa\xffd"', 1),
        lambda content: content.replace(b'"said"', b'"sai_"', 1),
        lambda content: content[:-20] + bytes(byte ^ 255 for byte in content[-20:]),
    ],
    ids=["empty", "cut in half", "cut in the header", "pickle", "not UTF-8", "no progress", "flipped"],
)
def test_a_damaged_checkpoint_is_one_line(saved, damage):
    path, model, optimizer, _ = saved
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ArtifactError,
        match=r"checkpoint\.safetensors is missing or damaged .*start the run anew: rm -r .* --resume",
    ) as error:
        checkpoint.restore(path, model, optimizer)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_refused(saved):
    with pytest.raises(ArtifactError, match="belongs to another model or recipe"):
        checkpoint.restore(saved[0], *stepped(hidden_size=8, intermediate_size=8))
