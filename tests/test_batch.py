"""Packing loses padding and nothing else."""

from dataclasses import replace

import pytest
import torch

from bertforge.batch import PaddedBatch, pack

# Three sequences, a a / b / c c c, small enough to check by eye.
RIGHT = PaddedBatch(
    input_ids=torch.tensor([[11, 12, 0], [21, 0, 0], [31, 32, 33]]),
    attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]),
    token_type_ids=torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]]),
    tabular={"numeric": torch.randn(3, 2), "multi": torch.ones(3, 4, dtype=torch.int64)},
)
LEFT = replace(
    RIGHT,
    input_ids=torch.tensor([[0, 11, 12], [0, 0, 21], [31, 32, 33]]),
    attention_mask=torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]]),
    token_type_ids=torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0, 1]]),
)


@pytest.mark.parametrize("batch", [RIGHT, LEFT], ids=["padded right", "padded left"])
def test_the_modules_example(batch):
    packed = pack(batch)
    assert packed.input_ids.tolist() == [11, 12, 21, 31, 32, 33]
    assert packed.position_ids.tolist() == [0, 1, 0, 0, 1, 2]
    assert packed.token_type_ids.tolist() == [0, 1, 1, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 3
    assert len(packed) == 3
    assert packed.tabular is batch.tabular


def test_no_token_types_stay_none():
    assert pack(replace(RIGHT, token_type_ids=None)).token_type_ids is None


@pytest.mark.parametrize("mask", [torch.bool, torch.float32], ids=str)
def test_a_mask_of_any_dtype(mask):
    assert pack(replace(RIGHT, attention_mask=RIGHT.attention_mask.to(mask))).cu_seqlens.tolist() == [0, 2, 3, 6]


def test_moving_a_batch_moves_every_tensor_in_it():
    # The meta device stands for any other: what is moved there says so.
    moved = pack(RIGHT).to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.position_ids, moved.cu_seqlens, moved.token_type_ids)} == {
        "meta"
    }
    assert {t.device.type for t in moved.tabular.values()} == {"meta"}
    assert moved.max_seqlen == 3
    assert replace(RIGHT, tabular=None).to("meta").tabular is None
    assert RIGHT.to("cpu").input_ids.tolist() == RIGHT.input_ids.tolist()
