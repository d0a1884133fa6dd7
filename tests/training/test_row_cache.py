"""What is kept comes back as it was, whichever tier it lies in, and nothing is left of it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bertforge.errors import MachineError
from bertforge.training import row_cache
from bertforge.training.row_cache import DISK, GPU, HOST, Room, RowCache, fits

WIDTH = 4
ROWS = np.array([7, 2, 9, 4])
LENGTHS = np.array([3, 5, 1, 2])
TOKEN = WIDTH * 2  # bytes in bfloat16
CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def sample(device="cpu"):
    return torch.zeros(1, WIDTH, dtype=torch.bfloat16, device=device)


def room(gpu=0, host=0, disk=0):
    """In tokens."""
    return Room(gpu * TOKEN, host * TOKEN, disk * TOKEN)


def values(rows):
    """A pack of `rows` and three tokens that fill it; every number tells its row and place."""
    length = dict(zip(ROWS, LENGTHS, strict=True))
    parts = [torch.arange(length[row] * WIDTH).view(-1, WIDTH) + 10 * row for row in rows]
    return torch.cat([*parts, torch.full((3, WIDTH), 99)]).bfloat16()


@pytest.mark.parametrize(
    ("device", "given", "held"),
    [
        ("cpu", room(host=11), {HOST: 11}),
        ("cpu", room(disk=11), {DISK: 11}),
        ("cpu", room(host=8, disk=3), {HOST: 8, DISK: 3}),
        ("cpu", room(host=7, disk=8), {HOST: 3, DISK: 8}),  # a row lies whole in one tier
        pytest.param("cuda", room(gpu=11), {GPU: 11}, marks=cuda),
        pytest.param("cuda", room(gpu=8, host=3), {GPU: 8, HOST: 3}, marks=cuda),
        pytest.param("cuda", room(gpu=3, host=5, disk=3), {GPU: 3, HOST: 5, DISK: 3}, marks=cuda),
        pytest.param("cuda", room(disk=11), {DISK: 11}, marks=cuda),
    ],
)
def test_rows_come_back_in_any_order_from_any_tier(tmp_path, device, given, held):
    check(tmp_path, device, given, held)


def check(folder, device, given, held):
    cache = RowCache(ROWS, LENGTHS, sample(device), given, folder)
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
    assert list(folder.iterdir()) == [], "the file on disk has no name"


def test_a_pack_with_a_missing_row_is_not_staged(tmp_path):
    cache = RowCache(ROWS, LENGTHS, sample(), room(host=11), tmp_path)
    cache.put(ROWS[:2], values(ROWS[:2]))
    assert cache.stage(ROWS[:2], 14) is not None
    assert cache.stage(ROWS[1:3], 14) is None


def test_all_rows_have_room_or_none_is_kept():
    assert fits(LENGTHS, sample(), room(host=11))
    assert not fits(LENGTHS, sample(), room(host=10))
    assert not fits(LENGTHS, sample(), room(gpu=7, host=4)), "11 tokens, but the row of 5 is not cut in two"
    assert not fits(LENGTHS, sample(), room())


def test_host_memory_is_taken_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "_BLOCK", 6 * TOKEN)
    given = room(host=16)
    assert given.blocks() == [(GPU, 0), (HOST, 6 * TOKEN), (HOST, 6 * TOKEN), (HOST, 4 * TOKEN), (DISK, 0)]
    check(tmp_path, "cpu", given, {HOST: 11})
    assert not fits(LENGTHS, sample(), room(host=9)), "3 of 6 tokens, then a row of 5 that finds 3"


def test_a_limit_fills_the_fastest_tier_first():
    assert Room(5, 6, 7).within(100) == Room(5, 6, 7)
    assert Room(5, 6, 7).within(12) == Room(5, 6, 1)
    assert Room(5, 6, 7).within(4) == Room(4, 0, 0)
    assert Room(5, 6, 7).within(0) == Room(0, 0, 0)


def test_what_is_free_is_halved(tmp_path):
    free = Room.free(CPU, tmp_path / "not" / "made" / "yet")
    assert free.gpu == 0
    assert 0 < free.host < row_cache.free_host_bytes()
    assert 0 < free.disk < row_cache.shutil.disk_usage(tmp_path).free


def test_a_disk_that_gives_less_than_it_said_is_one_line(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_cache.os, "posix_fallocate", refuse)
    expected = r"no room for 0\.0 GB of the frozen layers' output on disk \(.*No space left.*\); .* prefix_cache_gb=0$"
    with pytest.raises(MachineError, match=expected):
        RowCache(ROWS, LENGTHS, sample(), room(disk=11), tmp_path)
    assert list(Path(tmp_path).iterdir()) == []
