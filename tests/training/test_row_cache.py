"""What is kept comes back as it was, whichever memory it lies in."""

import numpy as np
import pytest
import torch

from bertforge.errors import MachineError
from bertforge.training import row_cache
from bertforge.training.row_cache import GPU, HOST, Room, RowCache, fits

WIDTH = 4
ROWS = np.array([7, 2, 9, 4])
LENGTHS = np.array([3, 5, 1, 2])
TOKEN = WIDTH * 2  # bytes in bfloat16
CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def sample(device="cpu"):
    return torch.zeros(1, WIDTH, dtype=torch.bfloat16, device=device)


def room(gpu=0, host=0):
    """In tokens."""
    return Room(gpu * TOKEN, host * TOKEN)


def values(rows):
    """A pack of `rows` and three tokens that fill it; every number tells its row and place."""
    length = dict(zip(ROWS, LENGTHS, strict=True))
    parts = [torch.arange(length[row] * WIDTH).view(-1, WIDTH) + 10 * row for row in rows]
    return torch.cat([*parts, torch.full((3, WIDTH), 99)]).bfloat16()


@pytest.mark.parametrize(
    ("device", "given", "held"),
    [
        ("cpu", room(host=11), {HOST: 11}),
        pytest.param("cuda", room(gpu=11), {GPU: 11}, marks=cuda),
        pytest.param("cuda", room(gpu=8, host=3), {GPU: 8, HOST: 3}, marks=cuda),
        pytest.param("cuda", room(gpu=7, host=8), {GPU: 3, HOST: 8}, marks=cuda),  # a row lies whole in one of them
    ],
)
def test_rows_come_back_in_any_order_from_any_memory(device, given, held):
    check(device, given, held)


def check(device, given, held):
    cache = RowCache(ROWS, LENGTHS, sample(device), given)
    assert {tier: size for tier, size in cache.bytes.items() if size} == {t: n * TOKEN for t, n in held.items()}
    assert cache.stage(ROWS, 14) is None, "nothing is kept yet"
    for rows in (ROWS[:1], ROWS[1:]):
        cache.put(rows, values(rows).to(device))
    for rows in (ROWS[::-1], ROWS[[2, 0]], ROWS[:1], ROWS[1:3], ROWS[:0]):
        hidden = cache.gather(cache.stage(rows, 14))
        used = len(values(rows)) - 3
        assert hidden.shape == (14, WIDTH)
        assert hidden.device.type == device
        assert torch.equal(hidden[:used].cpu(), values(rows)[:used])
        assert not hidden[used:].any(), "what fills a pack is zero"


def test_a_pack_with_a_missing_row_is_not_staged():
    cache = RowCache(ROWS, LENGTHS, sample(), room(host=11))
    cache.put(ROWS[:2], values(ROWS[:2]))
    assert cache.stage(ROWS[:2], 14) is not None
    assert cache.stage(ROWS[1:3], 14) is None


def test_all_rows_have_room_or_none_is_kept():
    assert fits(LENGTHS, sample(), room(host=11))
    assert not fits(LENGTHS, sample(), room(host=10))
    assert not fits(LENGTHS, sample(), room(gpu=7, host=4)), "11 tokens, but the row of 5 is not cut in two"
    assert not fits(LENGTHS, sample(), room())


def test_host_memory_is_taken_in_blocks(monkeypatch):
    monkeypatch.setattr(row_cache, "_BLOCK", 6 * TOKEN)
    given = room(host=16)
    assert given.blocks() == [(GPU, 0), (HOST, 6 * TOKEN), (HOST, 6 * TOKEN), (HOST, 4 * TOKEN)]
    check("cpu", given, {HOST: 11})
    assert not fits(LENGTHS, sample(), room(host=9)), "3 of 6 tokens, then a row of 5 that finds 3"


def test_a_limit_fills_the_gpu_first():
    assert Room(5, 6).within(100) == Room(5, 6)
    assert Room(5, 6).within(7) == Room(5, 2)
    assert Room(5, 6).within(4) == Room(4, 0)
    assert Room(5, 6).within(0) == Room(0, 0)


def test_what_is_free_is_halved():
    free = Room.free(CPU)
    assert free.gpu == 0
    assert 0 < free.host < row_cache.free_host_bytes()


def test_memory_that_is_not_there_after_all_is_one_line(monkeypatch):
    monkeypatch.setattr(row_cache, "_BLOCK", 1 << 60)
    tokens = 1 << 50  # 9 petabytes, more than any address space holds
    expected = r"^no room for \d+\.\d GB of the frozen layers' output in host memory \(.+\); .* prefix_cache_gb=0$"
    with pytest.raises(MachineError, match=expected):
        RowCache(ROWS[:1], np.array([tokens]), sample(), room(host=tokens))
