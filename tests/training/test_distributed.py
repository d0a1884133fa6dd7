"""Two processes train what one does, and a run goes on whatever ended it and on however many."""

import itertools
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bertforge.cli.main import main
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.training.config import load_recipe
from bertforge.training.distributed import ALONE, World, joined
from bertforge.training.finetune import finetune
from bertforge.training.optim import make_optimizer
from bertforge.training.step import EagerStep
from tests.model.tiny import tiny_bert
from tests.runs import KINDS, WEIGHTS, make_base
from tests.training.processes import Forked, UnderTorchrun, ended, held
from tests.training.test_resume import CrashError, crash_after, outcome
from tests.training.test_step import examples

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")


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
    """A TOML file of a quick run: so small steps that the curve has points within an epoch, where it can be held."""
    settings = {"model": str(base), "epochs": 3, "patience": 3, "max_length": 48, "tokens_per_step": 256, "lr": 2e-3}
    settings |= {"precision": "fp32", "class_weights": "balanced", "label_smoothing": 0.1, **changes}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    for section, values in KINDS[kind].items():
        kept = {name: value for name, value in values.items() if not name.endswith("dropout") or dropout}
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in kept.items())]
    path = folder / f"{kind}.toml"
    path.write_text("\n".join(lines))
    return path


def train(data, out, recipe, *more):
    """The arguments of `bertforge`."""
    return ["train", "--data", data, "--out", out, "--recipe", recipe, *more]


def in_two(data, out, recipe, *more, start=Forked):
    """What `bertforge train` says on stderr in two processes that end well."""
    code, printed, said = ended(start(folder_beside(out), *train(data, out, recipe, *more)))
    assert code == 0, said
    assert printed.count(f"wrote {out}") == said.count("2 x ") == 1, "one process prints"
    return said


def folder_beside(out):
    """A new name for what is said."""
    return next(
        path for number in itertools.count() if not (path := out.with_name(f"{out.name}-said-{number}")).exists()
    )


def in_one(data, out, recipe, *settings, **options):
    return finetune(data, out, load_recipe(path=recipe).with_settings(list(settings)), **options)


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
    ("kind", "start", "changes"),
    [
        ("lora", UnderTorchrun, {"tokens_per_step": 512, "epochs": 2}),
        ("columns", Forked, {"tokens_per_step": 48, "epochs": 1, "lr": 1e-4}),
    ],
    ids=["packs of many rows", "packs of one row or two"],
)
def test_two_processes_train_what_one_does(tmp_path, data, plain, kind, start, changes):
    recipe = recipe_file(tmp_path, plain, kind, **changes)
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    in_two(data, two, recipe, start=start)
    in_one(data, one, recipe)
    in_one(data, other, recipe, "seed=43")
    probes = [json.loads((run / "bertforge.json").read_text())["probe"] for run in (one, two)]
    assert probes[0]["validation_loss"] == pytest.approx(probes[1]["validation_loss"], rel=1e-5)
    assert furthest(weights(one, kind), weights(two, kind)) < 1e-5
    assert furthest(weights(one, kind), weights(other, kind)) > 1e-3
    for ours, theirs in zip(epochs(one), epochs(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_two_processes_keep_nothing_of_frozen_layers_and_train_what_one_does_that_keeps_all(tmp_path, data, plain):
    recipe, setting = recipe_file(tmp_path, plain, epochs=2), "lora.last_layers=1"
    one, two, said = tmp_path / "one", tmp_path / "two", []
    assert "layer 0 is frozen: every epoch computes its output anew" in in_two(data, two, recipe, "--set", setting)
    in_one(data, one, recipe, setting, started=lambda plan: said.append(plan.frozen))
    assert " of its output are kept, " in said[0]
    assert furthest(weights(one), weights(two)) < 1e-5


def test_a_run_of_one_process_goes_on_in_two(tmp_path, data, uninterrupted):
    (recipe, whole), out = uninterrupted, tmp_path / "run"
    with pytest.raises(CrashError):
        in_one(data, out, recipe, show=crash_after(30))
    assert "resuming after step 30 of" in in_two(data, out, recipe, "--resume")
    assert furthest(weights(out), weights(whole)) < 1e-5
    assert epochs(out)[-1] == pytest.approx(epochs(whole)[-1], rel=1e-5)


@pytest.mark.parametrize(("start", "rank"), [(Forked, 0), (UnderTorchrun, 1)])
def test_a_killed_worker_ends_the_run_in_a_line_and_one_process_goes_on(tmp_path, data, uninterrupted, start, rank):
    (recipe, whole), out = uninterrupted, tmp_path / "run"
    pair = start(folder_beside(out), *train(data, out, recipe), hold=rank)
    held(pair)
    os.kill(pair.worker(rank), signal.SIGKILL)
    code, _, said = ended(pair)
    assert code != 0
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

    def interrupt(start, whom, *more):
        pair = start(folder_beside(out), *train(data, out, recipe, *more), hold=1)
        held(pair)
        os.kill(whom(pair), signal.SIGTERM)
        code, _, said = ended(pair)
        assert code != 0
        assert said.count(f"stopped at a checkpoint in {out}; the same command with --resume goes on") == 1, said
        assert "error: " not in said

    interrupt(UnderTorchrun, lambda torchrun: torchrun.pid)  # torchrun, which passes it on to both
    interrupt(Forked, lambda pair: pair.worker(1), "--resume")
    assert "resuming after step" in in_two(data, out, recipe, "--resume")
    assert outcome(out, "lora") == whole


def test_an_error_of_every_process_is_told_once(tmp_path, data, plain):
    arguments = train(data, tmp_path / "run", recipe_file(tmp_path, plain, max_length=65))
    code, _, said = ended(Forked(tmp_path / "said", *arguments))
    assert code == UsageError.exit_code
    assert said.count("max_length=65, but") == 1
    assert "a worker died" not in said
    assert not (tmp_path / "run").exists()


def train_differently():
    """`bertforge train` with a setting that each process has for itself."""
    sys.argv += ["--set", f"lr={1e-3 * (1 + int(os.environ['RANK']))}"]
    main()


def test_processes_with_other_recipes_are_refused(tmp_path, data, plain):
    arguments = train(data, tmp_path / "run", recipe_file(tmp_path, plain))
    code, _, said = ended(Forked(tmp_path / "said", *arguments, target=train_differently))
    assert code == ArtifactError.exit_code
    assert "reads recipe of hash" in said
    assert not (tmp_path / "run").exists()


def meet():
    """What each of two processes finds out from the other."""
    with joined() as world:
        assert world.sum(torch.full((2,), world.rank + 1.0)).tolist() == [3, 3]
        assert world.gather(torch.tensor([world.rank, 7])).tolist() == [[0, 7], [1, 7]]
        assert world.any(world.rank == 1, False) == (True, False)
        assert world.texts(f"Zürich {world.rank}") == ["Zürich 0", "Zürich 1"]
        world.check_same("a", "data")
        with pytest.raises(ArtifactError, match=r"^process 1 reads data b, process 0 a; give all the same$"):
            world.check_same("ab"[world.rank], "data")
        with world.together():
            pass
        with world.together():
            if world.rank:
                raise DataError("row 7 is odd")


def take_a_clipped_step():
    """Two processes take half a pack each; what they clip is the sum of both, as one process would clip it."""

    def gradients(rows, most, world=ALONE):
        model = tiny_bert()
        optimizer = make_optimizer(model, 2e-5, 2e-5, 0.01)
        EagerStep(model, optimizer, torch.tensor([1.0, 3.0]), 0.0, most, "fp32", world).backward(*examples().pack(rows))
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    pack = np.arange(8)
    norm = gradients(pack, most=1e9).norm().item()
    with joined() as world:
        for most in (norm / 4, 4 * norm):
            clipped = gradients(pack, most)
            assert clipped.norm().item() == pytest.approx(min(norm, most), rel=1e-4)
            # The same numbers, summed in two halves: float32 rounds the last of seven digits.
            torch.testing.assert_close(gradients(pack[world.rank :: 2], most, world), clipped, rtol=1e-4, atol=1e-6)


def test_the_gradients_of_all_processes_are_clipped_together(tmp_path):
    code, _, said = ended(Forked(tmp_path / "said", target=take_a_clipped_step))
    assert code == 0, said


def test_what_one_process_finds_all_raise_and_one_tells(tmp_path):
    pair = Forked(tmp_path / "said", target=meet)
    _, _, said = ended(pair)
    # The one that told left with a traceback, for there is no command line here; the other left with the exit code.
    assert said.count("DataError: row 7 is odd") == 1, said
    assert sorted(process.exitcode for process in pair.processes) == [1, DataError.exit_code], said


def test_alone_nothing_is_changed():
    world, ones = World(), torch.ones(2)
    assert world.sum(ones) is ones
    assert world.any(True, False) == (True, False)
    assert world.texts("here") == ["here"]
    assert world.gather(ones).tolist() == [[1, 1]]
    with pytest.raises(DataError, match="a row"), world.together():
        raise DataError("a row")
