"""The idle share says how long training waits: a loader that sleeps raises it, a step that takes longer lowers it."""

import json
import time

import pytest
import torch

from bertforge.data import loader
from bertforge.model.bert import BertModel
from bertforge.training.checkpoint import Progress
from bertforge.training.finetune import finetune
from bertforge.training.idle import IdleMeter
from bertforge.training.step import EagerStep
from tests.runs import STEPS, quick_recipe

PAUSE = 0.1  # seconds; a step of the tiny model takes some 5 ms, more where the machine is busy


def idle_of(manifest):
    """The run's share, after a look at whether its curve and its summary tell the same."""
    shares = [point["train/idle"] for point in manifest["history"] if "train/idle" in point]
    assert len(shares) == 2, "one an epoch of seven steps"
    assert min(shares) - 1e-9 <= manifest["metrics"]["idle"] <= max(shares) + 1e-9
    return manifest["metrics"]["idle"]


def test_a_loader_that_sleeps_is_seen_and_one_that_is_ready_in_time_is_not(tmp_path, data, base, monkeypatch):
    pack, step = loader.Examples.pack, EagerStep.__call__

    def slow_pack(*arguments):
        time.sleep(PAUSE)
        return pack(*arguments)

    def slow_step(*arguments):
        time.sleep(1.5 * PAUSE)
        return step(*arguments)

    monkeypatch.setattr(loader.Examples, "pack", slow_pack)
    starved = idle_of(finetune(data, tmp_path / "starved", quick_recipe(base)))
    monkeypatch.setattr(EagerStep, "__call__", slow_step)
    hidden = idle_of(finetune(data, tmp_path / "hidden", quick_recipe(base)))
    assert starved > 0.4, "the loader takes several times as long as a step"
    assert hidden < 0.3, "the next pack is made while a step runs: only an epoch's first is waited for"


def test_computing_frozen_layers_is_work(tmp_path, data, base, monkeypatch):
    lower_layers = BertModel.lower_layers

    def slow_lower_layers(*arguments):
        time.sleep(PAUSE)
        return lower_layers(*arguments)

    monkeypatch.setattr(BertModel, "lower_layers", slow_lower_layers)
    recipe = quick_recipe(base, "lora", lora={"r": 2, "last_layers": 1}, prefix_cache_gb=0.0)
    assert idle_of(finetune(data, tmp_path / "run", recipe)) < 0.3


def test_the_meter_by_hand():
    meter = IdleMeter(torch.device("cpu"))
    with meter.work():
        time.sleep(0.05)
    time.sleep(0.15)
    idle, whole = meter.read()
    assert 0.15 <= idle < whole
    assert whole - idle == pytest.approx(0.05, abs=0.02)
    time.sleep(0.02)
    again, whole = meter.read()
    assert again == whole, "each reading begins where the last one ended"


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
    assert manifest["history"][0]["train/idle"] == first
    idle_of(manifest)
