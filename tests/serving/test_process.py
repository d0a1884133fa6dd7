"""The engine process, asked over its socket: what it loads, swaps, refuses and survives."""

import asyncio
import contextlib
import json
import logging
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bertforge.engines.pytorch import PyTorchEngine
from bertforge.errors import ArtifactError, MachineError
from bertforge.inference.predictor import Predictor
from bertforge.manifest import MANIFEST
from bertforge.serving.channel import EngineClient, RefusedError
from bertforge.serving.process import FAILED, EngineProcess, main
from bertforge.serving.settings import EngineOrder, Pace
from tests.runs import made_up, reseal

CLOSE = 1e-4  # float32, summed in other orders


class Front:
    """A front that reads folders as it is told, and asks rows of a table."""

    def __init__(self, path):
        self.states = []
        self.client = EngineClient(path, self.states.append)
        self.models = {}

    async def ready(self, states=1):
        while len(self.states) < states:
            await asyncio.sleep(0.002)
        self.adopt(self.states[-1])

    def adopt(self, state):
        for model in state.models:
            self.models[model.name] = model.generation, Predictor.load(model.folder, "fp32")
        self.client.adopted(state)

    async def ask(self, name, frame):
        """Logits, and those of the folder by itself."""
        generation, predictor = self.models[name]
        given = predictor.codec.read(frame)
        ids, offsets = predictor.tokenizer.encode(given.texts)
        columns = predictor.codec.arrays(given.columns)
        answer = await self.client.ask(name, generation, "c", ids, np.diff(offsets), columns)
        return answer.logits, predictor.logits(given.texts, given.columns)


@contextlib.asynccontextmanager
async def serving(socket, adapters=None, **models):
    folders = [{name: str(folder) for name, folder in group.items()} for group in (models, adapters or {})]
    process = EngineProcess(EngineOrder(str(socket), *folders, precision="fp32"))
    running = asyncio.create_task(process.run())
    front = Front(socket)
    front.client.start()
    try:
        ready = asyncio.create_task(front.ready())
        await asyncio.wait([ready, running], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            ready.cancel()
            await running
        yield process, front
    finally:
        await front.client.close()
        process.end()
        await asyncio.wait([running])


@pytest.fixture
def socket(tmp_path):
    return tmp_path / "engine"


@pytest.fixture
def model(runs, tmp_path):
    """A folder that a test may change."""
    return shutil.copytree(runs["full"], tmp_path / "model")


FRAME = made_up(12, seed=5)


def test_it_answers_as_the_folder_does_for_every_kind_of_model(runs, socket):
    async def scene():
        async with serving(socket, **runs) as (_, front):
            told = {model.name: (model.engine, model.precision) for model in front.states[0].models}
            assert told == dict.fromkeys(runs, ("pytorch", "fp32"))
            for name in runs:
                found, wanted = await front.ask(name, FRAME)
                assert np.abs(found - wanted).max() < CLOSE
                for row in range(3):
                    alone, _ = await front.ask(name, FRAME.iloc[[row]])
                    assert np.abs(alone - wanted[row]).max() < CLOSE

    asyncio.run(scene())


def test_a_model_that_is_not_served_is_refused_by_name(runs, socket):
    async def scene():
        async with serving(socket, a=runs["full"]) as (_, front):
            generation, predictor = front.models["a"]
            for asked in (("b", generation), ("a", "sha256:00")):
                front.models["x"] = asked[1], predictor
                with pytest.raises(RefusedError) as refused:
                    await front.client.ask(*asked, "c", np.array([1, 2]), np.array([2]))
                assert refused.value.reason == "unknown model"

    asyncio.run(scene())


def change_weights(folder):
    """Another model in the folder, golden rows and all."""
    weights = folder / "model.safetensors"
    found = load_file(weights)
    found["classifier.bias"] += torch.tensor([3.0, 0.0])
    save_file(found, weights)
    golden = json.loads((folder / MANIFEST).read_text())["golden"]
    golden["logits"] = (np.array(golden["logits"], np.float32) + np.array([3, 0], np.float32)).tolist()
    reseal(folder, golden=golden)


def test_a_folder_that_changed_takes_the_old_ones_place_and_no_ask_is_lost(model, socket):
    async def scene():
        async with serving(socket, a=model) as (process, front):
            old, wanted = await front.ask("a", FRAME)
            before, swapped = front.models["a"], asyncio.Event()
            shifts = set()

            async def client():
                while not swapped.is_set():
                    found, _ = await front.ask("a", FRAME)
                    shifts.add(tuple(np.round(found[0] - old[0], 2).tolist()))

            clients = [asyncio.create_task(client()) for _ in range(4)]
            await asyncio.sleep(0.05)
            change_weights(model)
            await process.reload()
            while len(front.states) < 2:
                await asyncio.sleep(0.002)
            for _ in range(3):  # the front has not adopted the new one: the old one answers
                found, _ = await front.ask("a", FRAME)
                assert np.abs(found - wanted).max() < CLOSE
            front.adopt(front.states[-1])
            found, own = await front.ask("a", FRAME)
            assert np.abs(found - own).max() < CLOSE
            assert np.abs(found - old - np.array([3, 0])).max() < CLOSE
            swapped.set()
            await asyncio.gather(*clients)
            assert shifts <= {(0.0, 0.0), (3.0, 0.0)}
            front.models["a"] = before
            with pytest.raises(RefusedError) as refused:  # nobody holds the old one any more
                await front.ask("a", FRAME)
            assert refused.value.reason == "unknown model"

    asyncio.run(scene())


def test_a_front_that_has_not_adopted_holds_the_old_one_for_itself(model, socket):
    async def scene():
        async with serving(socket, a=model) as (process, first):
            second = Front(socket)
            second.client.start()
            await second.ready()
            change_weights(model)
            await process.reload()
            await first.ready(2)
            await second.ask("a", FRAME)
            await second.client.close()  # and with its end it lets go
            for _ in range(1000):
                if not process._retired:
                    break
                await asyncio.sleep(0.002)
            assert not process._retired
            found, wanted = await first.ask("a", FRAME)
            assert np.abs(found - wanted).max() < CLOSE

    asyncio.run(scene())


def test_a_folder_that_cannot_be_served_leaves_the_old_one_serving(model, runs, socket, caplog):
    async def scene():
        async with serving(socket, a=model, b=runs["lora"]) as (process, front):
            weights = model / "model.safetensors"
            found = load_file(weights)
            found["classifier.bias"] += 1
            save_file(found, weights)
            reseal(model)  # whole, but not the model it was
            with caplog.at_level(logging.INFO):
                await process.reload()
            assert "b is up to date" in caplog.text
            assert "a was not swapped" in caplog.text
            assert "does not compute what it did" in caplog.text
            assert {number.name: number.generation for number in front.states[-1].models} == {
                name: generation for name, (generation, _) in front.models.items()
            }
            answer, _ = await front.ask("b", FRAME)
            assert len(answer) == len(FRAME)
            generation, _ = front.models["a"]
            assert generation == front.states[0].models[0].generation

    asyncio.run(scene())


@pytest.mark.parametrize("kind", ["full", "columns"])
def test_an_engine_that_gives_other_logits_than_were_saved_is_not_served(runs, socket, kind, monkeypatch):
    honest = PyTorchEngine.logits

    def wrong(self, batch):  # of rows that are batched, as only a queue does it
        found = honest(self, batch)
        return found if len(found) == 1 else found[::-1]

    monkeypatch.setattr(PyTorchEngine, "logits", wrong)

    async def scene():
        with pytest.raises(ArtifactError, match="does not compute what it did when it was saved: logits differ by"):
            async with serving(socket, a=runs[kind]):
                pass

    asyncio.run(scene())


def test_an_engine_that_fails_over_its_golden_rows_is_not_served(runs, socket, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(PyTorchEngine, "logits", broken)

    async def scene():
        with pytest.raises(ArtifactError, match="cannot compute its golden rows: RuntimeError: no kernel image"):
            async with serving(socket, a=runs["full"]):
                pass

    asyncio.run(scene())


def test_an_engine_that_fails_refuses_that_batch_and_ends_the_process_with_a_code_of_its_own(runs, socket, monkeypatch):
    async def scene():
        process = EngineProcess(EngineOrder(str(socket), {"a": str(runs["full"])}, precision="fp32"))
        running = asyncio.create_task(process.run())
        front = Front(socket)
        front.client.start()
        await front.ready()

        def broken(self, batch):
            raise RuntimeError("device-side assert")

        monkeypatch.setattr(PyTorchEngine, "logits", broken)
        generation, _ = front.models["a"]
        with pytest.raises(RefusedError) as refused:
            await front.client.ask("a", generation, "c", np.array([1, 2]), np.array([2]))
        assert refused.value.reason == "failed"
        assert await running == FAILED
        assert front.states[-1] is None
        await front.client.close()

    asyncio.run(scene())


def test_what_was_asked_is_answered_before_the_process_ends(runs, socket):
    async def scene():
        async with serving(socket, a=runs["full"]) as (process, front):
            asks = [asyncio.create_task(front.ask("a", FRAME)) for _ in range(20)]
            while not process._fronts or not any(front.requests for front in process._fronts.values()):
                await asyncio.sleep(0)
            process.end()
            for found, wanted in await asyncio.gather(*asks):
                assert np.abs(found - wanted).max() < CLOSE

    asyncio.run(scene())


def test_loads_are_told(runs, socket, monkeypatch):
    monkeypatch.setattr("bertforge.serving.process._EVERY", 0.01)

    async def scene():
        async with serving(socket, a=runs["full"]) as (_, front):
            while front.client.loads.get("a") is None:
                await asyncio.sleep(0.002)
            assert front.client.loads["a"].rows == 32  # of the golden rows, each twice
            assert front.client.loads["a"].waiting == 0

    asyncio.run(scene())


def test_the_process_itself_begins_swaps_and_ends(model, socket):
    process = subprocess.Popen(
        EngineOrder(str(socket), {"a": str(model)}, precision="fp32", pace=Pace(latency=0.01)).command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    async def scene():
        front = Front(socket)
        front.client.start()
        await asyncio.wait_for(front.ready(), 60)
        change_weights(model)
        process.stdin.write("reload\n")
        process.stdin.flush()
        await asyncio.wait_for(front.ready(2), 60)
        found, wanted = await front.ask("a", FRAME)
        assert np.abs(found - wanted).max() < CLOSE
        await front.client.close()

    try:
        asyncio.run(scene())
    finally:
        told, said = process.communicate(timeout=60)  # closes its standard input
    assert process.returncode == 0
    assert said == "a was swapped\n"
    lines = told.splitlines()
    assert [json.loads(line) for line in lines if line != "alive"] == [{"a": str(model.resolve())}] * 2
    assert "alive" in lines


def test_it_is_told_to_load_again_before_it_has_loaded(model, socket):
    process = subprocess.Popen(
        EngineOrder(str(socket), {"a": str(model)}, precision="fp32").command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("reload\n")
    process.stdin.flush()
    assert process.stderr.readline() == "a is up to date\n"
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_link_that_points_elsewhere_changes_nothing_until_it_is_loaded(model, runs, socket, tmp_path, capsys):
    """What is told is where the link led, for fronts and for an engine process that is started again."""
    link = tmp_path / "current"
    link.symlink_to(model)

    async def scene():
        async with serving(socket, a=link) as (process, front):
            link.unlink()
            link.symlink_to(tmp_path / "nothing")
            assert front.states[0].models[0].folder == str(model.resolve())
            await process.reload()
            told = json.loads(capsys.readouterr().out.replace("alive\n", "").splitlines()[-1])
            assert told == {"a": str(model.resolve())}
        order = EngineOrder(str(socket), {"a": str(link)}, precision="fp32", serving=told)
        again = EngineProcess(order)
        running = asyncio.create_task(again.run())
        other = Front(socket)
        other.client.start()
        await other.ready()
        link.unlink()
        link.symlink_to(runs["lora"])
        await again.reload()  # which reads the link
        await other.ready(2)
        assert other.states[-1].models[0].folder == str(runs["lora"].resolve())
        await other.client.close()
        again.end()
        await running

    asyncio.run(scene())


def test_an_engine_that_does_not_return_ends_the_process(runs, socket, monkeypatch):
    monkeypatch.setattr("bertforge.serving.process._EVERY", 0.01)
    monkeypatch.setattr("bertforge.serving.process._HUNG", 0.05)

    async def scene():
        process = EngineProcess(EngineOrder(str(socket), {"a": str(runs["full"])}, precision="fp32"))
        running = asyncio.create_task(process.run())
        front = Front(socket)
        front.client.start()
        await front.ready()
        released, honest = threading.Event(), PyTorchEngine.logits

        def hang(self, batch):
            released.wait(60)
            return honest(self, batch)

        monkeypatch.setattr(PyTorchEngine, "logits", hang)
        generation, _ = front.models["a"]
        with pytest.raises(RefusedError) as refused:
            await front.client.ask("a", generation, "c", np.array([1, 2]), np.array([2]))
        assert refused.value.reason == "away"
        assert await running == FAILED
        released.set()
        await asyncio.to_thread(process._loaded["a"].batcher.close)
        await front.client.close()

    asyncio.run(scene())


def test_what_cannot_be_served_is_one_line_and_the_exit_code_of_its_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    order = EngineOrder(str(tmp_path / "engine"), {"a": str(tmp_path / "nothing")})
    monkeypatch.setattr("bertforge.serving.process._with_input", EngineProcess.run)
    assert EngineOrder.from_json(order.command()[-1]) == order
    assert main(order) == ArtifactError.exit_code
    assert "nothing does not exist" in capsys.readouterr().err

    async def no_memory(self):
        raise MemoryError

    monkeypatch.setattr("bertforge.serving.process._with_input", no_memory)
    assert main(order) == MachineError.exit_code
    assert "the memory is full" in capsys.readouterr().err
