"""The processes of a service, kept alive: each is a few lines of Python here that say what the real one would."""

import asyncio
import sys
import time

import pytest

from bertforge.serving import supervisor
from bertforge.serving.settings import EngineOrder, FrontOrder, Service
from tests.serving.service import PATIENCE

STAYS = "for line in sys.stdin: note(line.strip())"
READY = "say('ready')\n" + STAYS
ENGINE = "say('alive')\n" + STAYS
ENDS_WHEN_TOLD = "say('alive')\nsys.stdin.readline()"


class Watched:
    """A supervisor of processes whose code is the next of `engine` or `front`, and the last one from then on."""

    def __init__(self, monkeypatch, folder, engine=(ENGINE,), front=(READY,), fronts=1):
        self.notes, self.said, self.orders, self.is_ready = folder / "notes", [], [], False
        self.notes.touch()
        self._codes = {"engine": [*engine], "front": [*front]}
        monkeypatch.setattr(EngineOrder, "command", lambda order: self._command("engine", order))
        monkeypatch.setattr(FrontOrder, "command", lambda order: self._command("front", order))
        monkeypatch.setattr(supervisor, "_PAUSES", (0.0,))
        listening = supervisor.listen("127.0.0.1", 0)
        service = Service({"a": folder}, fronts=fronts)
        self.supervisor = supervisor.Supervisor(service, listening, lambda event, message: self.said.append(message))

    def _command(self, name, order):
        self.orders.append((name, order))
        codes = self._codes[name]
        code = codes.pop(0) if len(codes) > 1 else codes[0]
        if isinstance(code, OSError):
            raise code
        head = (
            "import signal, sys, time\n"
            "def say(text): print(text, flush=True)\n"
            f"def note(text): open({str(self.notes)!r}, 'a').write(f'{name} {{text}}\\n')\n"
        )
        return [sys.executable, "-S", "-c", head + code]

    def _now_ready(self):
        self.is_ready = True

    async def run(self, scene):
        running = asyncio.create_task(self.supervisor.run(self._now_ready))
        playing = asyncio.create_task(scene(self))
        await asyncio.wait([running, playing], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            self.supervisor._end()
            self.supervisor._end()  # at once
        playing.cancel()
        if playing.done() and not playing.cancelled():
            playing.result()
        return await running

    async def until(self, true):
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, self.said
            await asyncio.sleep(0.01)

    def starts(self, name):
        return sum(each == name for each, _ in self.orders)


@pytest.fixture
def watched(monkeypatch, tmp_path):
    return lambda **given: Watched(monkeypatch, tmp_path, **given)


def test_who_is_told_to_load_again_before_it_can_read_does_so_once_it_can(watched):
    """A signal would have ended a process that has no handler yet."""

    async def scene(service):
        await service.until(lambda: len(service.supervisor._running) == 2)
        service.supervisor._swap()
        await service.until(lambda: len(service.notes.read_text().splitlines()) == 2)

    late = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(0.2)\n"
    service = watched(engine=[late + ENGINE], front=[late + READY])
    asyncio.run(service.run(scene))
    assert sorted(service.notes.read_text().splitlines()) == ["engine reload", "front reload"]
    assert service.starts("engine") == service.starts("front") == 1


def test_a_process_that_cannot_be_started_for_a_while_is_tried_again(watched):
    async def scene(service):
        await service.until(lambda: service.is_ready)
        service.supervisor._swap()
        await service.until(lambda: service.starts("engine") == 4)

    full = OSError(12, "Cannot allocate memory")
    service = watched(engine=[ENDS_WHEN_TOLD, full, full, ENGINE])
    asyncio.run(service.run(scene))
    why = "the engine process cannot be started (OSError: [Errno 12] Cannot allocate memory); it is started again"
    assert service.said[1:3] == [why] * 2


def test_a_service_that_cannot_begin_says_why_and_ends(watched):
    async def scene(service):
        await asyncio.Event().wait()

    service = watched(engine=[OSError(12, "Cannot allocate memory")], front=[STAYS])
    assert asyncio.run(service.run(scene)) == 1
    assert "the engine process cannot be started (OSError: [Errno 12] Cannot allocate memory)" in service.said


def test_a_defect_of_the_supervisor_ends_the_service_and_is_not_lost(watched, monkeypatch):
    async def broken(self, name, process):
        process.kill()
        await process.wait()
        raise ValueError("a defect")

    async def scene(service):
        await asyncio.Event().wait()

    monkeypatch.setattr(supervisor.Supervisor, "_attend", broken)
    with pytest.raises(ValueError, match="a defect"):
        asyncio.run(watched().run(scene))


def test_an_engine_process_that_says_nothing_any_more_is_killed_and_started_again(watched, monkeypatch):
    monkeypatch.setattr(supervisor, "_SILENT", 0.3)

    async def scene(service):
        await service.until(lambda: service.starts("engine") >= 2)
        assert service.is_ready

    service = watched()
    asyncio.run(service.run(scene))
    assert "the engine process has not answered for 0.3 s and is killed" in service.said
    assert service.starts("front") == 1, "a front need not say anything"


def test_an_engine_process_begins_again_with_the_folders_that_it_served(watched):
    async def scene(service):
        await service.until(lambda: service.is_ready)
        service.supervisor._swap()
        await service.until(lambda: service.starts("engine") == 2)

    service = watched(engine=["""say('{"a": "/models/2"}')\n""" + ENDS_WHEN_TOLD, ENGINE])
    asyncio.run(service.run(scene))
    assert [order.serving for name, order in service.orders if name == "engine"] == [None, {"a": "/models/2"}]


def test_the_tenth_front_is_called_so(watched):
    async def scene(service):
        await service.until(lambda: service.is_ready)

    service = watched(fronts=11)
    asyncio.run(service.run(scene))
    files = {order.counters.rpartition("/")[2] for name, order in service.orders if name == "front"}
    assert files == {f"served-{number}.json" for number in range(1, 12)}
    assert service.supervisor._fronts[9:] == ["front 10", "front 11"]
