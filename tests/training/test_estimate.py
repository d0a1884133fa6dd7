"""An estimate is what a run takes, for every variant that fits; it changes nothing on disk."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from bertforge.data import loader
from bertforge.data.prepared import PreparedData
from bertforge.data.schema import QUESTIONS
from bertforge.errors import UsageError
from bertforge.model.bert import BertModel
from bertforge.training import estimate as module
from bertforge.training.config import Recipe, load_recipe
from bertforge.training.estimate import OUT_OF_MEMORY, estimate
from bertforge.training.finetune import assemble, finetune
from bertforge.training.loop import Trainer
from bertforge.training.step import EagerStep
from tests.model.tiny import tiny_bert
from tests.runs import STEPS, quick_recipe
from tests.training.clock import Clock, slowed
from tests.training.processes import HANGS

BRIEF = 0.2  # seconds in all, so that few steps are timed or only one; one of the tiny model takes some 5 ms
AMPLE = 60.0  # as many as it takes for every round, also on a busy machine


@pytest.fixture(scope="module")
def deep(tmp_path_factory, base):
    """A model like `base` with five layers."""
    from bertforge.data.tokens import Tokenizer

    folder = tmp_path_factory.mktemp("deep")
    tiny_bert(0, vocab_size=30522, max_position_embeddings=64, num_hidden_layers=5).save_pretrained(folder)
    Tokenizer.load(base).save(folder)
    return folder


def rows_of(data, recipe, **options):
    return {row["variant"]: row for row in estimate(data, recipe, seconds=BRIEF, **options)["rows"]}


def test_the_three_variants_are_measured_and_nothing_is_written(tmp_path, data, deep, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, said = {path: path.stat().st_mtime_ns for path in data.rglob("*")}, []
    rows = rows_of(data, quick_recipe(deep), price_per_hour=3.6, say=said.append)
    assert list(rows) == ["full", "lora-r8", "lora-r8-last-4"]
    assert list(dict.fromkeys(text.partition(":")[0] for text in said)) == [f"measuring {name}" for name in rows]
    counts = [row["trainable_parameters"] for row in rows.values()]
    adapter, head = 2 * 2 * 8 * 16, 2 * 16 + 2  # query and value, A and B, rank 8, width 16
    assert counts[1:] == [5 * adapter + head, 4 * adapter + head]
    assert counts[0] > counts[1]
    for row in rows.values():
        assert row["steps_timed"] >= 1
        assert 0 < row["train_seconds_low"] <= row["train_seconds"] <= row["train_seconds_high"]
        assert row["validation_seconds"] > 0
        assert row["seconds_per_epoch"] == row["train_seconds"] + row["validation_seconds"]
        assert row["questions_per_s"] == pytest.approx(128 / row["train_seconds"])
        run = row["train_seconds"] + row["later_seconds"] + 2 * row["validation_seconds"]
        assert row["device_hours"] == pytest.approx(run / 3600), "the recipe has two epochs"
        assert row["cost_per_epoch"] == pytest.approx(row["seconds_per_epoch"] / 1000), "3.60 an hour"
        assert row["cost"] == pytest.approx(run / 1000)
        assert row["idle"] is None or 0 <= row["idle"] <= 1
        assert row["waited"] is None or 0 <= row["waited"] <= 1
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


PACK, STEP, LOWER = 0.1, 0.01, 0.5  # seconds by the clock below


@pytest.fixture
def clock(monkeypatch):
    """The clock that estimates and runs read, which stands still but for steps of `STEP` seconds."""
    clock = Clock()
    for name in ("estimate", "loop", "idle"):
        monkeypatch.setattr(f"bertforge.training.{name}.time", clock)
    monkeypatch.setattr(EagerStep, "__call__", slowed(EagerStep.__call__, clock, STEP))
    return clock


def test_it_foretells_what_a_run_takes(tmp_path, data, base, monkeypatch, clock):
    """Packs take longest; they are made in another thread, but an epoch waits for all of them."""
    monkeypatch.setattr(loader.Examples, "pack", slowed(loader.Examples.pack, clock, PACK))
    monkeypatch.setattr(module, "_ROUNDS", 2)
    row = estimate(data, quick_recipe(base), seconds=AMPLE)["rows"][0]
    progress = finetune(data, tmp_path / "run", quick_recipe(base))["metrics"]
    assert row["train_seconds"] == pytest.approx(STEPS * (PACK + STEP))
    assert row["validation_seconds"] == pytest.approx(PACK)
    assert row["seconds_per_epoch"] * 2 == pytest.approx(progress["seconds"])
    assert row["idle"] > PACK / (STEPS + 1) / (PACK + STEP), "a pass waits for its first pack at least"


def test_later_epochs_are_measured_with_what_frozen_layers_gave(data, deep, monkeypatch, clock):
    monkeypatch.setattr(BertModel, "lower_layers", slowed(BertModel.lower_layers, clock, LOWER))
    monkeypatch.setattr(module, "_ROUNDS", 1)
    rows = estimate(data, quick_recipe(deep, epochs=3), seconds=AMPLE)["rows"]
    for row in rows[:2]:
        assert row["later_seconds"] == row["train_seconds"] == pytest.approx(STEPS * STEP), "no layer is frozen below"
    first, later = rows[2]["train_seconds"], rows[2]["later_seconds"]
    assert first == pytest.approx(STEPS * (LOWER + STEP))
    assert later == pytest.approx(STEPS * STEP)
    run = first + 2 * later + 3 * rows[2]["validation_seconds"]
    assert rows[2]["device_hours"] == pytest.approx(run / 3600)
    once = estimate(data, quick_recipe(deep, epochs=1), seconds=AMPLE)["rows"][2]
    assert once["later_seconds"] == once["train_seconds"], "one epoch keeps nothing"


def test_the_run_itself_is_measured_where_it_is_none_of_the_three(data, deep):
    recipe = quick_recipe(deep, lora={"r": 2})
    rows = rows_of(data, recipe)
    assert list(rows) == ["as set", "full", "lora-r8", "lora-r8-last-4"]
    assert rows["as set"]["trainable_parameters"] < rows["lora-r8-last-4"]["trainable_parameters"]


def test_each_variant_has_its_own_recipe_with_what_the_user_changed():
    given = replace(load_recipe("lora-r8"), model="minilm")
    recipes = module._variants(given)
    assert list(recipes) == ["full", "lora-r8", "lora-r8-last-4"]
    for name, variant in {"full": "bert-base", "lora-r8": "lora-r8", "lora-r8-last-4": "lora-r8-last-4"}.items():
        assert recipes[name] == replace(load_recipe(variant), name=name, model="minilm")
    epochs = {name: variant.on(QUESTIONS).epochs for name, variant in recipes.items()}
    assert epochs["full"] != epochs["lora-r8"], "else this shows nothing"
    longer = module._variants(given.with_settings(["epochs=7", "max_length=64"]))
    assert {(recipe.epochs, recipe.max_length) for recipe in longer.values()} == {(7, 64)}
    assert longer["full"].on(QUESTIONS).lr == load_recipe("bert-base").on(QUESTIONS).lr
    columns = module._variants(load_recipe("columns"))
    assert list(columns) == ["as set", "full", "lora-r8", "lora-r8-last-4"]
    assert columns["as set"].tabular == load_recipe("columns").tabular
    assert columns["full"].tabular is None
    own = Recipe(name="mails", lora=load_recipe("lora-r8").lora, lr=1e-3)
    assert module._variants(own)["lora-r8"] == replace(own, name="lora-r8"), "what the user would run"
    assert module._variants(own)["full"] == replace(load_recipe("bert-base"), name="full", model=own.model, lr=1e-3)


def test_a_variant_whose_time_is_up_ends_with_the_step_under_way(data, base, monkeypatch, clock):
    step, steps = EagerStep.__call__, []

    def counted(*arguments):
        steps.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(EagerStep, "__call__", counted)
    for row in estimate(data, quick_recipe(base), seconds=2 * STEP / 3)["rows"][:2]:
        assert row["steps_timed"] == 1
        assert row["train_seconds"] == pytest.approx(STEPS * STEP)
    assert len(steps) == 2, "one of each variant"
    end, packs = clock.now + 2.5 * STEP, [np.array([row]) for row in range(20)]
    recipe = quick_recipe(base)
    run = assemble(PreparedData.open(data), recipe, torch.device("cpu"))
    cut_short = module._train(Trainer(run.model, run.split, recipe, data, "fp32"), packs, end)
    assert cut_short.steps == 3
    assert cut_short.seconds == pytest.approx(STEP)


def test_one_slow_moment_is_told_and_does_not_count(data, base, monkeypatch, clock):
    train_epoch, pause, epochs = Trainer.train_epoch, 3.0, []

    def train_epoch_with_a_slow_moment(self, *arguments):
        epochs.append(self)
        if len(epochs) == 4:  # after the first step, another one and the first round
            clock.pass_by(pause)
        return train_epoch(self, *arguments)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch_with_a_slow_moment)
    row = estimate(data, quick_recipe(base), seconds=AMPLE)["rows"][0]
    assert row["train_seconds_high"] >= pause
    assert row["train_seconds_low"] == pytest.approx(row["train_seconds"]) == pytest.approx(STEPS * STEP)
    assert row["busy"]


@pytest.mark.skipif(module._waited() is None, reason="this system does not tell")
def test_waiting_for_a_core_is_told_from_sleeping():
    before, cores = module._waited(), os.sched_getaffinity(0)
    time.sleep(1.0)
    assert module._waited() - before < 0.5, "but for its turn to wake up, on a busy machine"
    try:
        os.sched_setaffinity(0, {min(cores)})
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:  # on the same core
            before, end = module._waited(), time.monotonic() + HANGS
            while (waited := module._waited() - before) < 0.2 and time.monotonic() < end:
                pass
            other.kill()
        assert waited >= 0.2
    finally:
        os.sched_setaffinity(0, cores)


def test_columns_are_measured_with_the_text(data, base):
    with_columns, without = rows_of(data, quick_recipe(base, "columns")), rows_of(data, quick_recipe(base))
    for name in ("full", "lora-r8"):
        assert with_columns[name]["trainable_parameters"] > without[name]["trainable_parameters"]


def test_a_variant_with_more_layers_than_the_model_is_left_out(data, base):
    row = rows_of(data, quick_recipe(base))["lora-r8-last-4"]
    assert row == {"variant": "lora-r8-last-4", "missing": "the model has 2 layers, fewer than 4"}


def test_no_figure_depends_on_the_learning_rate(data, base):
    assert "train_seconds" in rows_of(data, quick_recipe(base, lr=1e30))["full"], "a run's loss would be no number"


@pytest.mark.parametrize("kind", ["CUDA's", "the CPU's"])
def test_a_variant_out_of_memory_says_so_and_the_others_go_on(data, base, monkeypatch, kind):
    step = EagerStep.__call__

    def full_needs_too_much(self, batch, labels):
        if all(parameter.requires_grad for parameter in self.model.parameters()):
            if kind == "CUDA's":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to ...")
            torch.empty(1 << 55)
        return step(self, batch, labels)

    monkeypatch.setattr(EagerStep, "__call__", full_needs_too_much)
    rows = rows_of(data, quick_recipe(base))
    assert rows["full"] == {"variant": "full", "missing": OUT_OF_MEMORY}
    assert rows["lora-r8"]["train_seconds"] > 0


def test_another_error_is_not_taken_for_a_lack_of_memory(data, base, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("nobody knows")

    with pytest.raises(UsageError, match="max_length=65, but"):
        rows_of(data, quick_recipe(base, max_length=65))
    monkeypatch.setattr(EagerStep, "__call__", fail)
    with pytest.raises(RuntimeError, match="nobody knows"):
        rows_of(data, quick_recipe(base))
