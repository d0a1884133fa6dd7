"""Runs are repeatable, and one that stopped goes on bit for bit, however it stopped."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bertforge.digests import read_sealed, write_sealed
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor
from bertforge.training import checkpoint, loop
from bertforge.training import finetune as module
from bertforge.training.config import LoraRecipe, load_recipe
from bertforge.training.finetune import finetune
from tests.runs import KINDS, STEPS, WEIGHTS, made_up, make_base, prepare_frame, quick_recipe, run_command
from tests.training.processes import HANGS, Alone, ended, held

TEMPORARY = {"checkpoint.safetensors", "best.safetensors", "running.json"}


class CrashError(Exception):
    """What no part of bertforge raises."""


def crash(*args, **fields):
    raise CrashError


def crash_after(step):
    def show(progress, sequences, loss):
        if progress.step == step:
            raise CrashError

    return show


def interrupt(number):
    """Sends a signal to this process; returns once it is handled, which may be later where another thread meets it."""
    handler = signal.getsignal(number)
    os.kill(os.getpid(), number)
    until = time.monotonic() + HANGS
    while signal.getsignal(number) is handler and time.monotonic() < until:
        time.sleep(0.001)


def outcome(run, kind):
    """What two equal runs must share: the weights' bytes, the curves and the summary, all that is timed aside."""
    manifest = json.loads((run / "bertforge.json").read_text())
    summary = without(manifest["metrics"], "seconds", "questions_per_s", "idle")
    return (run / WEIGHTS[kind]).read_bytes(), curves(run), summary, manifest["golden"]


def curves(run):
    """The points of the loss curve, without what is timed."""
    points = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [without(point, "train/idle") for point in points]


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def dropping_out(base, kind, **changes):
    """A recipe with dropout in every place that can have it."""
    return quick_recipe(base, kind, attention_dropout=0.1, **changes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data, base):
    folder = tmp_path_factory.mktemp("uninterrupted")
    for kind in KINDS:
        manifest = finetune(data, folder / kind, dropping_out(base, kind, checkpoint_seconds=3600))
        kept = manifest["metrics"]["best_epoch"]
        assert kept == 2 or torch.cuda.is_available(), "else the weights say nothing of the second epoch"
    return {kind: outcome(folder / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_run_and_another_seed_another(tmp_path, data, base, runs, kind):
    again, other = tmp_path / "again", tmp_path / "other"
    finetune(data, again, quick_recipe(base, kind))
    finetune(data, other, quick_recipe(base, kind, seed=43))
    assert outcome(again, kind) == outcome(runs[kind], kind)
    for ours, theirs in zip(outcome(other, kind), outcome(again, kind), strict=True):
        assert ours != theirs


@pytest.mark.parametrize(
    ("kind", "step", "seconds"),
    [
        *(pytest.param(kind, STEPS + 3, 0, id=f"{kind} in the middle of epoch 2") for kind in KINDS),
        pytest.param("columns", STEPS, 0, id="after the last step of epoch 1, before its validation"),
        pytest.param("columns", STEPS + 1, 3600, id="back to the end of epoch 1"),
        pytest.param("columns", 3, 3600, id="back to the beginning"),
    ],
)
def test_a_crashed_run_ends_as_one_that_never_stopped(tmp_path, data, base, uninterrupted, caplog, kind, step, seconds):
    recipe = dropping_out(base, kind, checkpoint_seconds=3600)
    out, stepping = tmp_path / "run", replace(recipe, checkpoint_seconds=seconds)
    with pytest.raises(CrashError):
        finetune(data, out, stepping, show=crash_after(step))
    resumed_at = []
    finetune(data, out, stepping, resume=True, started=lambda plan: resumed_at.append(plan.resumed_step))
    assert resumed_at == [step if seconds == 0 else step // STEPS * STEPS]
    assert ("the run starts from its beginning" in caplog.text) == (resumed_at == [0])
    assert outcome(out, kind) == uninterrupted[kind]


def test_it_would_not_without_the_random_state(tmp_path, data, base, uninterrupted, monkeypatch):
    recipe = dropping_out(base, "full", checkpoint_seconds=0)
    with pytest.raises(CrashError):
        finetune(data, tmp_path / "run", recipe, show=crash_after(STEPS + 3))
    monkeypatch.setattr(checkpoint, "restore", restoring_and(lambda optimizer: torch.manual_seed(0)))
    finetune(data, tmp_path / "run", recipe, resume=True)
    assert outcome(tmp_path / "run", "full")[1] != uninterrupted["full"][1], "the curve: an earlier epoch may be best"


def restoring_and(then, restore=checkpoint.restore):
    """`checkpoint.restore`, and something done to the optimizer after it."""

    def restored(path, model, optimizer, world):
        progress = restore(path, model, optimizer, world)
        then(optimizer)
        return progress

    return restored


def forget_moments(optimizer):
    for state in optimizer.state.values():
        state["exp_avg"].zero_()


@pytest.mark.skipif(not detect().bf16, reason="this machine has no bfloat16 arithmetic")
def test_in_bf16_too_where_a_gpu_replays_a_recorded_step(tmp_path, data, base, monkeypatch):
    recipe = quick_recipe(base, precision="bf16", checkpoint_seconds=0)
    finetune(data, tmp_path / "whole", recipe)
    for out, then in ((tmp_path / "resumed", lambda optimizer: None), (tmp_path / "forgetful", forget_moments)):
        with pytest.raises(CrashError):
            finetune(data, out, recipe, show=crash_after(STEPS + 3))
        monkeypatch.setattr(checkpoint, "restore", restoring_and(then))
        finetune(data, out, recipe, resume=True)
    whole, resumed, forgetful = (outcome(tmp_path / name, "full") for name in ("whole", "resumed", "forgetful"))
    assert resumed == whole
    assert forgetful[1] != whole[1]


def test_what_was_named_by_mistake_is_told_before_it_is_looked_for(tmp_path, data, base):
    out = tmp_path / "run"
    with pytest.raises(CrashError):
        finetune(data, out, quick_recipe(base, checkpoint_seconds=0), show=crash_after(1))
    with pytest.raises(ArtifactError, match=f"was started with model {base}, not nobody/knows"):
        finetune(data, out, quick_recipe("nobody/knows", checkpoint_seconds=0), resume=True)
    with pytest.raises(ArtifactError, match="holds a run that has not ended; go on with"):
        Predictor.load(out)


def test_a_crash_while_the_result_is_written_loses_nothing(tmp_path, data, base, uninterrupted, monkeypatch):
    out, recipe = tmp_path / "run", dropping_out(base, "lora", checkpoint_seconds=3600)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", crash)
        with pytest.raises(CrashError):
            finetune(data, out, recipe)
    with pytest.raises(ArtifactError, match="holds a run that has not ended"):
        Predictor.load(out)
    finetune(data, out, recipe, resume=True)
    assert outcome(out, "lora") == uninterrupted["lora"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_a_checkpoint_and_loses_no_step(tmp_path, data, base, uninterrupted, number):
    out, recipe = tmp_path / "run", dropping_out(base, "lora", checkpoint_seconds=3600)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    steps = []

    def show(progress, sequences, loss):
        steps.append(progress.step)
        if progress.step == STEPS + 3:
            interrupt(number)

    with pytest.raises(KeyboardInterrupt):
        finetune(data, out, recipe, show=show)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    finetune(data, out, recipe, resume=True, show=show)
    # The step under way when the signal came was finished and saved, so it is neither shown nor done again.
    assert steps == [step for step in range(1, 2 * STEPS + 1) if step != STEPS + 4]
    assert outcome(out, "lora") == uninterrupted["lora"]


def test_ctrl_c_on_the_command_line(tmp_path, data, base, capsys):
    recipe, out, whole = tmp_path / "long.toml", tmp_path / "run", tmp_path / "whole"
    recipe.write_text(f"model = '{base}'\nepochs = 3\npatience = 3\nmax_length = 48\ntokens_per_step = 256\n")
    command = ["train", "--data", data, "--recipe", recipe, "--out", out, "--set", "precision=fp32", "lr=1e-3"]
    process = Alone(tmp_path / "said", *command, hold=0)
    held(process)
    for more in ([], ["--resume"]):  # a live run is neither mixed with another nor gone on with
        assert run_command(*command, *more) == 4
        assert f"{out} is being written by process {process.pid}, since" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGINT)
    code, _, said = ended(process)
    assert code == 130, said
    assert f"stopped at a checkpoint in {out}; the same command with --resume goes on" in said
    assert "Traceback" not in said
    assert (out / "checkpoint.safetensors").is_file()
    assert run_command(*command, "--resume") == 0
    finetune(data, whole, load_recipe(path=recipe).with_settings(["precision=fp32", "lr=1e-3"]))
    assert outcome(out, "full") == outcome(whole, "full")


def test_a_crash_leaves_nothing_half_written(tmp_path, data, base):
    out = tmp_path / "run"
    with pytest.raises(CrashError):
        finetune(data, out, quick_recipe(base, checkpoint_seconds=0), show=crash_after(STEPS + 3))
    assert {path.name for path in out.iterdir()} - {"tensorboard"} == TEMPORARY | {"metrics.jsonl"}
    for name in ("checkpoint.safetensors", "best.safetensors"):
        load_file(out / name)
    with pytest.raises(ArtifactError, match="holds a run that has not ended"):
        Predictor.load(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_holds_what_it_takes_to_predict_and_no_more(runs, kind):
    files = {path.name for path in runs[kind].iterdir()} - {"tensorboard"}
    adapter = {"adapter_config.json"} if kind == "lora" else set()
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert files == {"bertforge.json", "config.json", "metrics.jsonl", WEIGHTS[kind]} | tokenizer | adapter


def test_a_folder_in_use_is_refused(tmp_path, data, base, runs):
    recipe = quick_recipe(base)
    for resume in (False, True):
        with pytest.raises(ArtifactError, match="holds a finished run; name another folder"):
            finetune(data, runs["full"], recipe, resume=resume)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("used", "file"):
        with pytest.raises(ArtifactError, match="is not an empty folder"):
            finetune(data, tmp_path / name, recipe)
    with pytest.raises(ArtifactError, match="holds no run to resume; start one without --resume"):
        finetune(data, tmp_path / "new", recipe, resume=True)
    assert not (tmp_path / "new").exists()


def test_a_stopped_run_goes_on_only_with_its_own_recipe_and_data(tmp_path, data, base):
    out, recipe = tmp_path / "run", quick_recipe(base, checkpoint_seconds=0)
    with pytest.raises(CrashError):
        finetune(data, out, recipe, show=crash_after(2))
    with pytest.raises(ArtifactError, match="go on with --resume, or remove it: rm -r"):
        finetune(data, out, recipe)
    with pytest.raises(ArtifactError, match=r"was started with lr 0\.002, not 1\.0; resume with the same"):
        finetune(data, out, replace(recipe, lr=1.0), resume=True)
    with pytest.raises(ArtifactError, match=r"was started with lora\.r None, not 8; resume with the same"):
        finetune(data, out, replace(recipe, lora=LoraRecipe()), resume=True)
    other = prepare_frame(made_up(160, seed=2), tmp_path / "other", base)
    with pytest.raises(ArtifactError, match=r"was started with data [0-9a-z:]+, not "):
        finetune(other, out, recipe, resume=True)
    content = (out / "checkpoint.safetensors").read_bytes()
    (out / "checkpoint.safetensors").write_bytes(content[:1000])
    with pytest.raises(ArtifactError, match="is missing or damaged"):
        finetune(data, out, recipe, resume=True)


def test_a_stopped_run_goes_on_only_on_its_own_base_and_kind_of_device(tmp_path, data):
    base = make_base(tmp_path / "base")
    out, recipe = tmp_path / "run", quick_recipe(base)
    with pytest.raises(CrashError):
        finetune(data, out, recipe, show=crash_after(2))
    running = out / "running.json"
    started = read_sealed(running)
    other = {"cpu": "cuda", "cuda": "cpu"}[started["device"]]
    write_sealed(running, started | {"device": other})
    with pytest.raises(ArtifactError, match=f"was started with device {other}, not {started['device']}; resume with"):
        finetune(data, out, recipe, resume=True)
    write_sealed(running, started)
    make_base(base, seed=1)  # another model under the same name
    with pytest.raises(ArtifactError, match=r"was started with base weights sha256:[0-9a-f]+, not sha256:"):
        finetune(data, out, recipe, resume=True)


DAMAGES = [lambda text: text[:50], lambda text: "[]", lambda text: "{}", lambda text: ""]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_of_what_runs_is_named_where_a_checkpoint_hangs_on_it(tmp_path, data, base, damage):
    out, recipe = tmp_path / "run", quick_recipe(base, checkpoint_seconds=0)
    with pytest.raises(CrashError):
        finetune(data, out, recipe, show=crash_after(2))
    running = out / "running.json"
    running.write_text(damage(running.read_text()))
    with pytest.raises(ArtifactError, match=r"running\.json is damaged \(.*\); start the run anew: rm -r"):
        finetune(data, out, recipe, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_note_locks_no_folder_that_holds_no_checkpoint(tmp_path, data, base, runs, caplog, resume):
    out, recipe = tmp_path / "run", quick_recipe(base)
    with pytest.raises(CrashError):
        finetune(data, out, recipe, show=crash_after(2))
    running = out / "running.json"
    running.write_text(running.read_text()[:50])
    finetune(data, out, recipe, resume=resume)
    assert outcome(out, "full") == outcome(runs["full"], "full")
    assert "running.json is damaged, and no checkpoint was saved yet: the run starts anew" in caplog.text


def test_a_run_without_its_note_cannot_go_on(tmp_path, data, base):
    out, recipe = tmp_path / "run", quick_recipe(base, checkpoint_seconds=0)
    with pytest.raises(CrashError):
        finetune(data, out, recipe, show=crash_after(2))
    (out / "running.json").unlink()
    with pytest.raises(ArtifactError, match=r"running\.json is missing, .*start it anew: rm -r .*/run, then"):
        finetune(data, out, recipe, resume=True)


def test_a_finished_run_loses_the_checkpoint_that_a_kill_left(tmp_path, data, base, runs):
    out = shutil.copytree(runs["lora"], tmp_path / "run")
    for name in TEMPORARY:
        (out / name).write_bytes(b"left")
    Predictor.load(out)
    assert {path.name for path in out.iterdir()} == {path.name for path in runs["lora"].iterdir()}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:1000])])
def test_damaged_best_weights_are_told_before_training_goes_on(tmp_path, data, base, damage):
    out, recipe, steps = tmp_path / "run", quick_recipe(base), []
    with pytest.raises(CrashError):
        finetune(data, out, recipe, show=crash_after(STEPS + 1))
    damage(out / "best.safetensors")
    with pytest.raises(ArtifactError, match=r"best\.safetensors is missing or damaged \(.*start the run anew") as error:
        finetune(data, out, recipe, resume=True, show=lambda progress, sequences, loss: steps.append(progress.step))
    assert "\n" not in str(error.value)
    assert steps == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_validation_stops_after_it(tmp_path, data, base, uninterrupted, monkeypatch, number):
    out, recipe, steps = tmp_path / "run", dropping_out(base, "lora", checkpoint_seconds=3600), []
    predict_logits = loop.predict_logits

    def interrupted(*arguments):
        interrupt(number)
        return predict_logits(*arguments)

    def show(progress, sequences, loss):
        steps.append(progress.step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "predict_logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(data, out, recipe, show=show)
    finetune(data, out, recipe, resume=True, show=show)
    assert steps == list(range(1, 2 * STEPS + 1)), "the epoch that was validated is not trained again"
    assert outcome(out, "lora") == uninterrupted["lora"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_is_raised_at_once(tmp_path, data, base, number):
    def interrupt_twice(progress, sequences, loss):
        interrupt(number)
        os.kill(os.getpid(), number)
        time.sleep(HANGS)
        pytest.fail("the second one was swallowed")

    with pytest.raises(KeyboardInterrupt):
        finetune(data, tmp_path / "run", quick_recipe(base), show=interrupt_twice)


def test_a_resumed_run_keeps_the_precision_that_auto_chose(tmp_path, data, base, monkeypatch):
    out, recipe = tmp_path / "run", quick_recipe(base, precision="auto", epochs=1, checkpoint_seconds=0)
    wanted = []

    def choose(hardware, asked):
        wanted.append(asked)
        return "fp32" if asked == "auto" else asked

    monkeypatch.setattr(module, "choose_training_precision", choose)
    with pytest.raises(CrashError):
        finetune(data, out, recipe, show=crash_after(2))
    manifest = finetune(data, out, recipe, resume=True)
    assert wanted == ["auto", "fp32"], "measured once, then taken from the run"
    assert manifest["precision"] == manifest["recipe"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"max_length": 65}, UsageError, "max_length=65, but .* holds 64 positions; --set max_length=64"),
        ({"lora": {"target_modules": ["wings"]}}, UsageError, "'wings' matches no linear layer; it could be"),
        ({"lora": {"last_layers": 3}}, UsageError, "last_layers=3, but the model has 2 layers"),
        ({"tabular": {"numeric": ["mood"]}}, DataError, "no column mood in"),
        (
            {"tabular": {"categorical": ["OpenStatus"], "hidden_size": 4}},
            UsageError,
            "names OpenStatus, which gives the label away",
        ),
        (
            {"tabular": {"multi": "PostClosedDate", "hidden_size": 4}},
            UsageError,
            "names PostClosedDate, which gives the label away",
        ),
        ({"tokens_per_step": 20}, UsageError, "raise tokens_per_step to 48"),
        ({"tabular": {"numeric": ["first_tag"]}}, DataError, "column 'first_tag' are no numbers"),
    ],
)
def test_settings_that_cannot_work_leave_no_folder_behind(tmp_path, data, base, changes, error, said):
    with pytest.raises(error, match=said):
        finetune(data, tmp_path / "run", quick_recipe(base, **changes))
    assert not (tmp_path / "run").exists()
