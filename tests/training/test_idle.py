"""The idle share says how long training waits: for a loader that is late, but not for a step that is at work."""

import json
import threading
import time

import pytest
import torch

from bertforge.data import loader
from bertforge.data.prepared import PreparedData
from bertforge.model.bert import BertModel
from bertforge.training.checkpoint import Progress
from bertforge.training.finetune import assemble, finetune
from bertforge.training.idle import IdleMeter
from bertforge.training.loop import Trainer
from bertforge.training.step import EagerStep
from tests.runs import STEPS, quick_recipe
from tests.training.clock import Clock, slowed

PACK, STEP = 3, 1  # seconds by the clock that the tests move; both exact in binary


@pytest.fixture
def clock(monkeypatch):
    """The clock that idle time is read from."""
    clock = Clock()
    monkeypatch.setattr("bertforge.training.idle.time", clock)
    return clock


def idle_of_an_epoch(folder, data, base, show=lambda progress, sequences, loss: None, **changes):
    """The share in the curve of one epoch on the CPU, whose idle time is read from Python's clock."""
    recipe = quick_recipe(base, **changes)
    run = assemble(PreparedData.open(data), recipe, torch.device("cpu"))
    points = []
    Trainer(run.model, run.split, recipe, folder, "fp32").train_epoch(points.append, threading.Event(), show)
    (point,) = points
    assert point["step"] == STEPS
    return point["train/idle"]


def test_waiting_for_the_loader_is_idle(tmp_path, data, base, monkeypatch, clock):
    """Each pack is made once the step before it has ended."""
    asked, pack = threading.Semaphore(1), loader.Examples.pack

    def late(*arguments):
        assert asked.acquire(timeout=60)
        clock.pass_by(PACK)
        return pack(*arguments)

    monkeypatch.setattr(loader.Examples, "pack", late)
    monkeypatch.setattr(EagerStep, "__call__", slowed(EagerStep.__call__, clock, STEP))
    found = idle_of_an_epoch(tmp_path, data, base, show=lambda *after_a_step: asked.release())
    assert found == PACK / (PACK + STEP)


def test_a_pack_made_while_a_step_is_at_work_is_not_waited_for(tmp_path, data, base, monkeypatch, clock):
    """Each pack is made while the step before it runs."""
    asked, made, pack, step = threading.Semaphore(1), threading.Semaphore(0), loader.Examples.pack, EagerStep.__call__
    later = iter(range(1, STEPS))  # packs that are made during a step

    def in_time(*arguments):
        assert asked.acquire(timeout=60)
        clock.pass_by(PACK)
        made.release()
        return pack(*arguments)

    def step_that_lasts(*arguments):
        assert made.acquire(timeout=60)  # its own pack
        if next(later, None):
            asked.release()
            assert made.acquire(timeout=60), "the next pack is made ahead"
            made.release()
        clock.pass_by(STEP)
        return step(*arguments)

    monkeypatch.setattr(loader.Examples, "pack", in_time)
    monkeypatch.setattr(EagerStep, "__call__", step_that_lasts)
    assert idle_of_an_epoch(tmp_path, data, base) == PACK / (STEPS * (PACK + STEP)), "only the first is waited for"


def test_computing_frozen_layers_is_work(tmp_path, data, base, monkeypatch, clock):
    monkeypatch.setattr(BertModel, "lower_layers", slowed(BertModel.lower_layers, clock, STEP))
    lora = {"r": 2, "last_layers": 1}
    assert idle_of_an_epoch(tmp_path, data, base, lora=lora, prefix_cache_gb=0.0) == 0
    assert clock.now == (1 + STEPS) * STEP, "one row to learn the type, then each pack"


def test_the_meter_by_hand(clock):
    meter = IdleMeter(torch.device("cpu"))
    with meter.work():
        clock.pass_by(1)
    clock.pass_by(3)
    assert meter.read() == (3, 4)
    clock.pass_by(2)
    assert meter.read() == (2, 2), "each reading begins where the last one ended"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_steps_that_are_queued_leave_no_idle_time_and_late_ones_do():
    def share(pause):
        torch.cuda.synchronize()
        meter = IdleMeter(torch.device("cuda", 0))
        for _ in range(10):
            with meter.work():
                torch.cuda._sleep(40_000_000)  # cycles: some 20 ms, of which the program does not wait
                done = torch.ones(1, device="cuda")
            if pause:
                done.item()
                time.sleep(pause)
        done.item()
        idle, whole = meter.read()
        return idle / whole

    share(0.0)
    assert share(0.0) < 0.1
    assert share(0.1) > 0.5


def test_the_share_of_a_run_weighs_its_readings_by_their_length():
    progress = Progress()
    assert progress.idle != progress.idle, "unknown at first"
    assert progress.add_time(1.0, 2.0) == 0.5
    assert progress.add_time(0.0, 6.0) == 0.0
    assert progress.idle == 1 / 8


def test_it_goes_on_with_a_resumed_run(tmp_path, data, base):
    def crash(progress, sequences, loss):
        if progress.step == STEPS + 3:
            raise RuntimeError

    recipe = quick_recipe(base, checkpoint_seconds=3600)
    with pytest.raises(RuntimeError):
        finetune(data, tmp_path / "run", recipe, show=crash)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["train/idle"]
    manifest = finetune(data, tmp_path / "run", recipe, resume=True)
    shares = [point["train/idle"] for point in manifest["history"] if "train/idle" in point]
    assert shares[0] == first
    assert len(shares) == 2, "one an epoch of seven steps"
    assert 0 <= min(shares) - 1e-9 <= manifest["metrics"]["idle"] <= max(shares) + 1e-9 <= 1 + 1e-9
