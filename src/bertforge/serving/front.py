"""A front: one process that speaks HTTP. `python -m bertforge.serving.front ORDER`, started by the supervisor.

It accepts from a socket that all fronts share, does everything but the model's work, and asks the engine process for
that. Its event loop is Python's own, which accepts all connections that wait in one turn. uvloop's accepts one of them
(libuv 1.48), so that under overload new clients waited for seconds where nobody could tell them that the service is
full; and it was no faster here.

It says `ready` on its standard output once it can answer, and ends when it is told to, or when its standard input
does, for then the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from bertforge import __version__
from bertforge.errors import BertforgeError
from bertforge.serving import classify, describe, events, explain, metrics, monitor, open_inference, tei
from bertforge.serving.connection import Connection
from bertforge.serving.door import Door, call_of
from bertforge.serving.keys import Keys
from bertforge.serving.models import Models
from bertforge.serving.page import page_routes
from bertforge.serving.requests import RequestError
from bertforge.serving.settings import READY, FrontOrder
from bertforge.terminal import Terminal

FORMS = {"/v2": open_inference.form, "/predict": tei.form, "/info": tei.form, "/": tei.form}
"""Of errors, by the first part of the address: of those that speak another protocol than ours."""
_PATIENCE = 2.0  # seconds to wait for the engine before connections are accepted
_IDLE = 75  # seconds, as nginx has it; a request that comes as its connection is closed is lost
_LAST = 0.5  # seconds from the word to end to the end of idle connections: what was on its way is answered


def make_app(models: Models) -> FastAPI:
    """The routes. Others join here: a function that takes `models` and returns an APIRouter."""
    app = FastAPI(
        title="bertforge",
        version=__version__,
        description="Labels for texts, from a fine-tuned BERT. With keys: `Authorization: Bearer KEY`.",
        docs_url=None,  # pages that load from other servers
        redoc_url=None,
        redirect_slashes=False,
    )
    for api in (classify, explain, monitor, open_inference, tei):
        app.include_router(api.router(models))
    app.router.routes += page_routes()

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Whether this front runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operation"], responses={503: {"model": describe.Refused}})
    async def readyz() -> dict[str, str]:
        """Whether requests can be answered: the engine is there with all its models."""
        models.get(None)
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse, tags=["operation"], responses=describe.refused())
    async def prometheus() -> Response:
        """For Prometheus."""
        page = await asyncio.to_thread(metrics.page, models.client.loads, monitor.Drift(models))
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return call_of(request).refuse(error)

    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> Response:
        methods = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message = {
            404: "there is no such address; GET /openapi.json lists all",
            405: f"this address takes {methods}",
        }
        refusal = RequestError(error.status_code, message.get(error.status_code, error.detail))
        response = call_of(request).refuse(refusal)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def refuse_field(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))
        return call_of(request).refuse(RequestError(422, f"{where}: {first['msg']}", where))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:  # the door logs it
        return call_of(request).refuse(RequestError(500, "the service failed over this request"))

    return app


async def serve(order: FrontOrder) -> None:
    """Runs until it is told to end."""
    models = Models(
        Path(order.engine),
        order.limits,
        lambda message: events.tell("folder_unreadable", message),
        counters=Path(order.counters),
        prior=order.prior,
    )
    keys = None if order.api_keys is None else Keys.read(Path(order.api_keys))
    door = Door(make_app(models), order.limits, keys, FORMS, models.full)
    config = uvicorn.Config(
        door, loop="asyncio", http=Connection, ws="none", lifespan="off", log_config=None, access_log=False,
        log_level="error", server_header=False, proxy_headers=False, timeout_keep_alive=_IDLE,
    )  # fmt: skip
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()

    def drain() -> None:
        """The supervisor has stopped new connections; those that are open are told that they end."""
        door.draining = True
        if under_way := len(server.server_state.tasks):
            events.tell("draining", f"requests still to answer: {under_way}", requests=under_way)
        loop.call_later(_LAST, setattr, server, "should_exit", True)

    def read_keys() -> None:
        try:
            door.keys = None if order.api_keys is None else Keys.read(Path(order.api_keys))
        except BertforgeError as error:
            events.tell("keys_kept", f"the keys stay as they were: {error}")

    def told() -> None:
        if os.read(0, 1024):
            read_keys()
        else:
            loop.remove_reader(0)
            drain()

    if order.again:
        metrics.restarted("front")
    models.start()
    # A front that is started beside others leaves connections to them until it can answer; the first ones, which wait
    # for the engine, tell that they live.
    with suppress(TimeoutError):  # where the engine takes longer, who asks is told so
        await asyncio.wait_for(_ready(models), _PATIENCE)
    listening = socket.socket(fileno=order.listening)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    # In the place of uvicorn's, which end idle connections at once.
    for number, act in ((signal.SIGTERM, drain), (signal.SIGINT, lambda: None)):
        loop.add_signal_handler(number, act)
    loop.add_reader(0, told)
    telling = asyncio.create_task(_tell(models))
    await serving
    telling.cancel()
    await models.client.close()


async def _ready(models: Models) -> None:
    while not models.ready:
        await asyncio.sleep(0.02)


async def _tell(models: Models) -> None:
    await _ready(models)
    print(READY.decode(), end="", flush=True)


def main() -> int:
    """The process; returns the exit code."""
    events.take_logging()
    order = FrontOrder.from_json(sys.argv[1])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection takes a file descriptor
    try:
        asyncio.run(serve(order))
    except Exception as error:
        return Terminal(stderr=True).tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
