"""The engine process of `bertforge serve`: it loads engines, computes for every front, and swaps folders.

    python -m bertforge.serving.process '{"socket": ..., "models": {"closed": "models/closed"}, ...}'

It listens on its socket once all that it was told to serve has given its golden rows' logits; before that, and for a
folder that does not, it says why in one line and ends with that error's exit code. It ends by itself

- with FAILED, when an engine fails over a batch, or does not return from one. A broken engine (a CUDA error above all)
  may be of no use from then on, and only a new process is sure to mend it. The requests of that batch are told so;
  others see the connection end.
- with 0, on SIGTERM or when its standard input ends, as it does when its supervisor is gone: what was asked by then is
  answered first.

When it is told to, it reads the folders again. One that changed is loaded beside the old one and replayed, and takes
its place; one that cannot be served leaves the old one where it is. An old one stays as long as a front may ask it
(`channel`).

Links are followed when a folder is loaded, and from then on all that is told is where they led: to fronts, and to the
supervisor, so that what reads the folder later reads the same one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np

from bertforge.artifact import hash_file
from bertforge.errors import ArtifactError, MachineError, reason
from bertforge.inference.predictor import Predictor
from bertforge.manifest import DECISION, MANIFEST, identity, served
from bertforge.serving.adapters import carriers, load_beside
from bertforge.serving.batcher import Batcher, Lane, Sent
from bertforge.serving.channel import (
    Adopted,
    Answer,
    Ask,
    Cancel,
    Connection,
    Message,
    Refusal,
    RefusedError,
    Served,
    State,
)
from bertforge.serving.golden import replay
from bertforge.serving.queue import Request
from bertforge.serving.settings import ALIVE, EngineOrder
from bertforge.terminal import Terminal, VisibleFormatter

FAILED = 70
"""The exit code after which a new process may do better."""
_EVERY = 1.0  # seconds between loads that are told
_FLUSH = 2.0  # seconds for what is unsent when the process ends
_HUNG = 60.0  # seconds after which a call of an engine is not expected to return

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Loaded:
    """An artifact that is ready to compute."""

    models: dict[tuple[str, str], Served]
    """By name and generation."""
    batcher: Batcher
    places: Mapping[str, str]
    """Where the folders of the model and its adapters are, by their names, links followed."""


@dataclass(eq=False)
class _Front:
    adopted: int
    """The number of the oldest state whose generations it may still ask."""
    requests: dict[int, tuple[Batcher, Request]] = field(default_factory=dict)


class EngineProcess:
    """The process's one object; all but loading and computing is done in its event loop."""

    def __init__(self, order: EngineOrder) -> None:
        self.order = order
        self._loaded: dict[str, Loaded] = {}
        self._routes: dict[tuple[str, str], Loaded] = {}
        self._retired: list[tuple[int, Loaded]] = []  # by the number of the first state without it
        self._fronts: dict[Connection, _Front] = {}
        self._state = State(0)
        self._reloading = asyncio.Lock()  # from the first loading on
        self._tasks: set[asyncio.Task[None]] = set()
        self._given = {**order.models, **order.adapters}
        self._paths = order.serving or self._given

    async def run(self) -> int:
        """Serves until it is told to end, and returns the exit code; raises BertforgeError where it cannot begin."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        async with self._reloading:
            models, adapters = (
                {name: self._paths[name] for name in given} for given in (self.order.models, self.order.adapters)
            )
            self._carriers = await asyncio.to_thread(carriers, models, adapters)
            for name in models:
                self._loaded[name] = await asyncio.to_thread(self._load, name)
            self._announce()
            self._paths = self._given
        server = await self._loop.create_unix_server(
            lambda: Connection(self._receive, self._opened, self._lost), self.order.socket
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._end, 0)
        telling = self._loop.create_task(self._tell_loads())
        code = await self._ended
        server.close()
        for task in (telling, *self._tasks):
            task.cancel()
        if code == 0:
            for loaded in {*self._loaded.values(), *(loaded for _, loaded in self._retired)}:
                await asyncio.to_thread(loaded.batcher.close)
            await asyncio.sleep(0)  # what the threads had to say
        for connection in [*self._fronts]:
            connection.close()
        for _ in range(int(_FLUSH / 0.01)):
            if not self._fronts:
                break
            await asyncio.sleep(0.01)
        return code

    async def reload(self) -> None:
        """Takes over the folders that changed; says of each what came of it."""
        async with self._reloading:
            for name, old in [*self._loaded.items()]:
                try:
                    if dict(old.models.keys()) == await asyncio.to_thread(self._generations, name):
                        log.info("%s is up to date", name)
                        continue
                    new = await asyncio.to_thread(self._load, name)
                except Exception as error:  # a folder may be anything
                    log.error("%s was not swapped, the one before it goes on: %s", name, reason(error))
                    continue
                self._loaded[name] = new
                self._retired.append((self._state.number + 1, old))
                log.info("%s was swapped", name)
            self._announce()

    def _load(self, name: str) -> Loaded:
        """Loads and replays; in a thread. Raises BertforgeError."""
        places, generations = self._places(name), self._generations(name)
        folders = {own: served(place)[0] for own, place in places.items()}
        base = Predictor.load(folders[name], self.order.precision, prior=self.order.prior)
        beside = {
            other: load_beside(base, other, folder, self.order.prior)
            for other, folder in folders.items()
            if other != name
        }
        predictors = {name: base, **beside}
        lanes = {
            own: Lane(predictor.engine, predictor.tokenizer.sep_id, predictor.max_length)
            for own, predictor in predictors.items()
        }
        ready, errors = Event(), list[Exception]()

        def broken(error: Exception) -> None:
            errors.append(error)
            if ready.is_set():
                self._loop.call_soon_threadsafe(self._fail, name, error)

        def deliver(sent: list[Sent]) -> None:
            self._loop.call_soon_threadsafe(_deliver, sent)

        batcher = Batcher(lanes, self.order.pace, deliver, broken)
        try:
            for own, predictor in predictors.items():
                replay(folders[own], predictor.codec, predictor.precision, partial(_asked, batcher, own))
            if self._generations(name) != generations:
                raise ArtifactError(f"{folders[name]} changed while it was loaded; have it loaded again")
        except RefusedError as error:
            batcher.close()
            told = reason(errors[0]) if errors else str(error)
            raise ArtifactError(f"{folders[own]} cannot compute its golden rows: {told}") from error
        except BaseException:
            batcher.close()
            raise
        ready.set()
        engine = base.engine
        about = [
            Served(
                own, generations[own], str(folder), engine.precision, engine.name, engine.device,
                None if own == name else name, identity(folder), predictors[own].manifest.get(DECISION),
            )
            for own, folder in folders.items()
        ]  # fmt: skip
        where = {own: str(place) for own, place in places.items()}
        return Loaded({(each.name, each.generation): each for each in about}, batcher, where)

    def _places(self, name: str) -> dict[str, Path]:
        """The folders of a model and of the adapters beside it, by their names, as links lead there now."""
        own = [name, *(adapter for adapter, carrier in self._carriers.items() if carrier == name)]
        return {each: Path(self._paths[each]).resolve() for each in own}

    def _generations(self, name: str) -> dict[str, str]:
        """Of the same, as they are now; what `fit` made has another folder within it."""
        return {own: hash_file(served(place)[0] / MANIFEST) for own, place in self._places(name).items()}

    def _announce(self) -> None:
        """Tells all fronts what is served now."""
        models = [about for loaded in self._loaded.values() for about in loaded.models.values()]
        self._state = State(self._state.number + 1, tuple(models))
        for loaded in (*(loaded for _, loaded in self._retired), *self._loaded.values()):
            self._routes |= dict.fromkeys(loaded.models, loaded)
        for connection in self._fronts:
            connection.send(self._state)
        print(
            json.dumps({own: at for loaded in self._loaded.values() for own, at in loaded.places.items()}), flush=True
        )
        self._let_go()

    def _let_go(self) -> None:
        """Closes what no front asks any more."""
        oldest = min((front.adopted for front in self._fronts.values()), default=self._state.number)
        for until, loaded in [*self._retired]:
            if oldest >= until:
                self._retired.remove((until, loaded))
                self._routes = {key: other for key, other in self._routes.items() if other is not loaded}
                self._loop.run_in_executor(None, loaded.batcher.close)

    def _opened(self, connection: Connection) -> None:
        self._fronts[connection] = _Front(self._state.number)
        connection.send(self._state)

    def _lost(self, connection: Connection) -> None:
        for batcher, request in self._fronts.pop(connection).requests.values():
            batcher.cancel(request)
        self._let_go()

    def _receive(self, connection: Connection, message: Message) -> None:
        front = self._fronts[connection]
        if isinstance(message, Ask):
            loaded = self._routes.get((message.model, message.generation))
            if loaded is None:
                told = "this model is no longer served; send the request again"
                connection.send(Refusal(message.number, "unknown model", told))
                return
            request = loaded.batcher.submit(message, message.model, partial(_reply, connection, front))
            if request is not None:
                front.requests[message.number] = loaded.batcher, request
        elif isinstance(message, Cancel):
            if (found := front.requests.pop(message.number, None)) is not None:
                found[0].cancel(found[1])
        elif isinstance(message, Adopted):
            front.adopted = message.number
            self._let_go()

    async def _tell_loads(self) -> None:
        while True:
            print(ALIVE.decode(), end="", flush=True)
            await asyncio.sleep(_EVERY)
            for name, loaded in self._loaded.items():
                if loaded.batcher.longest() > _HUNG:
                    self._fail(name, MachineError(f"a batch was not computed within {_HUNG:g} s"))
                load = loaded.batcher.load(name)
                for connection in self._fronts:
                    connection.send(load)

    def _fail(self, name: str, error: Exception) -> None:
        log.error("the engine of %s failed, so its process ends: %s", name, reason(error))
        self._end(FAILED)

    def _end(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

    def read_again(self) -> None:
        """Loads the folders again, once those before are loaded."""
        self._tasks.add(task := self._loop.create_task(self.reload()))
        task.add_done_callback(self._tasks.discard)

    def end(self) -> None:
        """As SIGTERM does."""
        self._end(0)


def _deliver(sent: list[Sent]) -> None:
    for reply, message in sent:
        reply(message)


def _reply(connection: Connection, front: _Front, message: Answer | Refusal) -> None:
    if front.requests.pop(message.number, None) is not None or isinstance(message, Refusal):
        connection.send(message)


def _asked(batcher: Batcher, lane: str, ask: Ask) -> np.ndarray:
    """The logits of an ask, waited for in a thread that is not the loop's."""
    answer: Future[Answer | Refusal] = Future()
    batcher.submit(ask, lane, answer.set_result)
    found = answer.result()
    if isinstance(found, Refusal):
        raise RefusedError(found.reason, found.message)
    return found.logits


def main(order: EngineOrder) -> int:
    """Runs the process until it ends; returns the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        return asyncio.run(_with_input(EngineProcess(order)))
    except Exception as error:
        return Terminal(stderr=True).tell(error)


async def _with_input(process: EngineProcess) -> int:
    """`process.run`, which ends when the standard input does; every line of it loads the folders again."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        if os.read(0, 1024):
            process.read_again()
        else:
            loop.remove_reader(0)
            process.end()

    running = loop.create_task(process.run())
    await asyncio.sleep(0)  # it has begun
    loop.add_reader(0, read)
    if code := await running:
        sys.stderr.flush()
        os._exit(code)  # the loop would wait for its threads, and those within a broken engine never end
    return code


if __name__ == "__main__":
    code = main(EngineOrder.from_json(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # as above
