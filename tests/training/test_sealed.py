"""Tensors of a run under way: they come back bit for bit, and damage or another run's file is refused."""

import pytest
import torch

from bertforge.digests import write_sealed
from bertforge.errors import ArtifactError
from bertforge.training.sealed import read_tensors, write_tensors

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "step": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "random": torch.arange(5, dtype=torch.uint8),
}


def test_they_come_back_bit_for_bit_with_what_was_said(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, {"epoch": 2, "loss": None})
    found, said = read_tensors(tmp_path / "file")
    assert said == {"epoch": 2, "loss": None}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_every_flipped_bit_that_changes_something_is_refused(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, TENSORS, {"epoch": 2})
    whole = path.read_bytes()
    before = read_tensors(path)
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        try:
            found = read_tensors(path)
        except ArtifactError:
            refused += 1
        else:  # padding of the header
            assert found[1] == before[1]
            assert all(torch.equal(found[0][n].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8))
                       for n, t in before[0].items())  # fmt: skip
    assert refused > 0.9 * len(whole)


def test_another_runs_file_is_refused(tmp_path):
    for name, seed in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        write_sealed(tmp_path / name / "running.json", {"recipe": {"seed": seed}})
        write_tensors(tmp_path / name / "best.safetensors", TENSORS, {"epoch": 1})
    read_tensors(tmp_path / "first" / "best.safetensors")
    (tmp_path / "first" / "best.safetensors").rename(tmp_path / "second" / "best.safetensors")
    with pytest.raises(ArtifactError, match=r"is of another run.*start the run anew: rm -r .*second"):
        read_tensors(tmp_path / "second" / "best.safetensors")
    with pytest.raises(ArtifactError, match=r"best\.safetensors is missing or damaged"):
        read_tensors(tmp_path / "first" / "best.safetensors")
