"""Two processes under torchrun train what one does, and a run goes on whatever ended it and on however many."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bertforge.errors import DataError
from bertforge.training.config import load_recipe
from bertforge.training.distributed import World
from bertforge.training.finetune import finetune
from tests.runs import KINDS, WEIGHTS, make_base
from tests.training.test_resume import CrashError, crash_after, outcome

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bertforge"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base without dropout: its masks depend on how rows are dealt."""
    folder = make_base(tmp_path_factory.mktemp("plain") / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0}))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data, plain):
    """A recipe and what it comes to in one process that nothing stops."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = recipe_file(folder, plain, checkpoint_seconds=0)
    in_one(data, folder / "run", recipe)
    return recipe, folder / "run"


def recipe_file(folder, base, kind="lora", dropout=False, **changes):
    """A TOML file of a quick run: many small steps, so that there is time to end it half-way."""
    settings = {"model": str(base), "epochs": 6, "patience": 6, "max_length": 48, "tokens_per_step": 256, "lr": 2e-3}
    settings |= {"precision": "fp32", "class_weights": "balanced", "label_smoothing": 0.1, **changes}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    for section, values in KINDS[kind].items():
        kept = {name: value for name, value in values.items() if not name.endswith("dropout") or dropout}
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in kept.items())]
    path = folder / f"{kind}.toml"
    path.write_text("\n".join(lines))
    return path


def start(data, out, recipe, *more):
    """`bertforge train` in two processes."""
    command = [*TORCHRUN, "train", "--data", data, "--out", out, "--recipe", recipe, *more]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def in_two(data, out, recipe, *more):
    """What `bertforge train` says on stderr in two processes that end well."""
    process = start(data, out, recipe, *more)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert printed.count(f"wrote {out}") == said.count("2 x ") == 1, "one process prints"
    return said


def in_one(data, out, recipe, *settings, **options):
    return finetune(data, out, load_recipe(path=recipe).with_settings(list(settings)), **options)


def wait_for_an_epoch(process, out):
    """Until the first point of the curve is written."""
    while not ((out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def worker(process, rank):
    """The process id of a rank."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def weights(run, kind="lora"):
    """All that was trained, but the keys' biases: their gradient is rounding alone, which AdamW makes a step of."""
    return {name: tensor for name, tensor in load_file(run / WEIGHTS[kind]).items() if not name.endswith("key.bias")}


def furthest(left, right):
    """The largest difference of two runs' weights."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def epochs(run):
    return [point for point in json.loads((run / "bertforge.json").read_text())["history"] if "epoch" in point]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("lora", {"tokens_per_step": 512, "epochs": 2}), ("columns", {"tokens_per_step": 48, "epochs": 1, "lr": 1e-4})],
    ids=["packs of many rows", "packs of one row or two"],
)
def test_two_processes_train_what_one_does(tmp_path, data, plain, kind, changes):
    recipe = recipe_file(tmp_path, plain, kind, **changes)
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    in_two(data, two, recipe)
    in_one(data, one, recipe)
    in_one(data, other, recipe, "seed=43")
    assert furthest(weights(one, kind), weights(two, kind)) < 1e-5
    assert furthest(weights(one, kind), weights(other, kind)) > 1e-3
    for ours, theirs in zip(epochs(one), epochs(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_of_one_process_goes_on_in_two(tmp_path, data, uninterrupted):
    (recipe, whole), out = uninterrupted, tmp_path / "run"
    with pytest.raises(CrashError):
        in_one(data, out, recipe, show=crash_after(30))
    assert "resuming after step 30 of" in in_two(data, out, recipe, "--resume")
    assert furthest(weights(out), weights(whole)) < 1e-5
    assert epochs(out)[-1] == pytest.approx(epochs(whole)[-1], rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_run_in_a_line_and_one_process_goes_on(tmp_path, data, uninterrupted, rank):
    (recipe, whole), out = uninterrupted, tmp_path / "run"
    process = start(data, out, recipe)
    wait_for_an_epoch(process, out)
    os.kill(worker(process, rank), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    told = [line for line in said.splitlines() if "a worker died" in line]
    assert len(told) == 1, said
    assert told[0].startswith("error: a worker died or fell silent; go on with --resume: the checkpoint of step ")
    assert told[0].endswith(f" in {out} is whole")
    assert "internal error" not in said
    steps = []
    in_one(data, out, recipe, resume=True, show=lambda progress, sequences, loss: steps.append(progress.step))
    assert f"step {steps[0] - 1:,} " in told[0]
    assert furthest(weights(out), weights(whole)) < 1e-5


@pytest.fixture(scope="module")
def dropping_out(tmp_path_factory, data, base):
    """A recipe with dropout and what it comes to in two processes that nothing stops."""
    folder = tmp_path_factory.mktemp("dropping-out")
    recipe = recipe_file(folder, base, dropout=True, attention_dropout=0.1, checkpoint_seconds=3600)
    in_two(data, folder / "run", recipe)
    return recipe, outcome(folder / "run", "lora")


def test_an_interrupted_run_of_two_processes_goes_on_bit_for_bit(tmp_path, data, dropping_out):
    (recipe, whole), out = dropping_out, tmp_path / "run"

    def interrupt(whom, *more):
        process = start(data, out, recipe, *more)
        wait_for_an_epoch(process, out)
        os.kill(whom(process), signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode != 0
        assert said.count(f"stopped at a checkpoint in {out}; the same command with --resume goes on") == 1, said
        assert "error: " not in said

    interrupt(lambda process: process.pid)  # torchrun, which passes it on to both
    (out / "metrics.jsonl").unlink()  # written anew as the run goes on
    interrupt(lambda process: worker(process, 1), "--resume")
    assert "resuming after step" in in_two(data, out, recipe, "--resume")
    assert outcome(out, "lora") == whole


def test_an_error_of_every_process_is_told_once(tmp_path, data, plain):
    process = start(data, tmp_path / "run", recipe_file(tmp_path, plain, max_length=65))
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert said.count("max_length=65, but") == 1
    assert "a worker died" not in said
    assert not (tmp_path / "run").exists()


MEETING = """
import torch
from bertforge.errors import ArtifactError, DataError
from bertforge.training.distributed import joined
with joined() as world:
    assert world.sum(torch.full((2,), world.rank + 1.0)).tolist() == [3, 3]
    assert world.gather(torch.tensor([world.rank, 7])).tolist() == [[0, 7], [1, 7]]
    assert world.any(world.rank == 1, False) == (True, False)
    assert world.texts(f"Zürich {world.rank}") == ["Zürich 0", "Zürich 1"]
    world.check_same("a", "data")
    try:
        world.check_same("ab"[world.rank], "data")
    except ArtifactError as error:
        assert str(error) == "process 1 reads data b, process 0 a; give all the same"
        with world.together():
            pass
        with world.together():
            if world.rank:
                raise DataError("row 7 is odd")
"""


def test_what_one_process_finds_all_raise_and_one_tells(tmp_path):
    (tmp_path / "meeting.py").write_text(MEETING)
    command = [*TORCHRUN[:-2], tmp_path / "meeting.py"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
    # The one that told left with a traceback, for there is no command line here; the other left with the exit code.
    assert said.count("DataError: row 7 is odd") == 1, said
    assert "AssertionError" not in said
    assert "exitcode  : 3" in said


def test_alone_nothing_is_changed():
    world, ones = World(), torch.ones(2)
    assert world.sum(ones) is ones
    assert world.any(True, False) == (True, False)
    assert world.texts("here") == ["here"]
    assert world.gather(ones).tolist() == [[1, 1]]
    with pytest.raises(DataError, match="a row"), world.together():
        raise DataError("a row")
