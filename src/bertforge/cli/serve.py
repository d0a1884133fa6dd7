"""`bertforge serve`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from bertforge.cli.threshold import Prior, by_label
from bertforge.terminal import Terminal

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT...",
            help="Folders made by `bertforge fit`, `train`, `merge`, `quantize` or `compile`; NAME=FOLDER gives one "
            "another name than the folder's. Requests that name no model get the first.",
        ),
    ],
    adapter: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=RUN",
            help="LoRA run to compute on the weights of an artifact of the same base, which are held once; "
            "requests name it as a model. Give one for each.",
        ),
    ] = [],  # noqa: B006  # typer makes a list of its own
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of API keys, one client per line: NAME KEY.")
    ] = None,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="Serve other machines without API keys.")] = False,
    fronts: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Processes that speak HTTP.", show_default="1, or a quarter of the cores"),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of runs and merged models: fp32, bf16 or auto. Engines have their own.")
    ] = "auto",
    prior: Prior = None,
    latency_ms: Annotated[
        float,
        typer.Option(
            min=1,
            max=10_000,
            help="Time that one batch may take, in milliseconds; a longer time allows larger batches.",
        ),
    ] = 50,
    queue_seconds: Annotated[
        float, typer.Option(min=0.01, max=600, help="Seconds of work that may wait; further requests get 429.")
    ] = 2,
    max_body_mb: Annotated[float, typer.Option(min=0.001, max=1024, help="Largest body of a request, MiB.")] = 8,
    max_texts: Annotated[int, typer.Option(min=1, help="Most texts in a request.")] = 1024,
    max_characters: Annotated[int, typer.Option(min=1, help="Most characters in a text.")] = 100_000,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Seconds to finish accepted requests on shutdown.")] = 30,
) -> None:
    """Serve models over HTTP: text in, label and probabilities out.

    Example:

        bertforge serve models/first

        curl http://127.0.0.1:8080/v1/classify \\
            -H 'Content-Type: application/json' -d '{"inputs": "How do I sort a list?"}'

    Where `bertforge threshold` chose thresholds, each answer has a decision.
    /v1/monitor shows whether what is asked still looks like what the model
    was trained on.

    /openapi.json describes every address. /v1/models lists the models and
    the columns they read, /readyz tells whether requests are answered, and
    /metrics is for Prometheus. The log has a line of JSON for each request,
    without its texts.

    SIGTERM or Ctrl-C ends the service once it has answered what it has
    accepted. SIGHUP loads folders that changed and the file of keys, without
    losing a request:

        kill -HUP PID

    To let other machines ask, write a file with a line for each client, its
    name and a key, such as `openssl rand -hex 32` makes. Clients send the
    header Authorization: Bearer KEY. Put a TLS proxy in front of the service.

        bertforge serve models/first --host 0.0.0.0 --api-keys keys.txt
    """
    import asyncio
    import signal

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to load again

    from bertforge.errors import MachineError, UsageError
    from bertforge.manifest import served
    from bertforge.serving import installed
    from bertforge.serving.events import tell
    from bertforge.serving.settings import Limits, Pace, Service
    from bertforge.threads import usable_cores

    if not installed():
        raise MachineError("the service needs FastAPI and uvicorn; pip install 'bertforge[serve]'")
    from bertforge.serving.keys import Keys
    from bertforge.serving.supervisor import Supervisor, is_local, listen

    models: dict[str, Path] = {}
    for artifact in artifacts:
        name, folder = _named(artifact)
        if name in models:
            raise UsageError(f"two models are called {name}; give one another name: NAME={folder}")
        models[name] = folder
    adapters: dict[str, Path] = {}
    for given in adapter:
        name, folder = _named(given)
        if name in models or name in adapters:
            raise UsageError(f"two models are called {name}; give --adapter {given} another name: NAME={folder}")
        adapters[name] = folder
    manifests = [served(folder)[1] for folder in models.values()]
    labels = [tuple(served(folder)[1]["labels"]) for folder in adapters.values()]
    if prior and len({*labels, *(tuple(manifest["labels"]) for manifest in manifests)}) > 1:
        raise UsageError("--prior is for all models, and these have different labels; serve them one by one")
    if api_keys is not None:
        Keys.read(api_keys)
    listening = listen(host, port)
    if not (is_local(listening) or api_keys or no_keys):
        raise UsageError(
            f"--host {host} lets other machines ask; name who may with --api-keys FILE, or let all in with --no-keys"
        )
    cores = usable_cores()
    service = Service(
        models=models,
        adapters=adapters,
        fronts=fronts or (1 if cores <= 4 else cores // 4),
        limits=Limits(max_body_mb, max_texts, max_characters),
        pace=Pace(latency_ms / 1000, queue_seconds),
        drain=drain_seconds,
        api_keys=api_keys,
        precision=precision,
        prior=by_label("--prior", prior),
    )
    console, names = Terminal(), [*models, *adapters]

    def ready() -> None:
        address, taken = listening.getsockname()[:2]
        shown = "127.0.0.1" if address in ("0.0.0.0", "::") else f"[{address}]" if ":" in address else address
        console.print(f"serving {', '.join(names)} at http://{shown}:{taken}; try it:")
        key = "" if api_keys is None else ' -H "Authorization: Bearer $KEY"'
        body = shlex.quote(json.dumps({"inputs": _example(manifests[0])}))
        console.print(f"curl http://{shown}:{taken}/v1/classify{key} -H 'Content-Type: application/json' -d {body}")

    console.print(f"loading {', '.join(names)}")
    code = asyncio.run(Supervisor(service, listening, tell).run(ready))
    if code:
        raise typer.Exit(code)


def _named(artifact: str) -> tuple[str, Path]:
    from bertforge.errors import UsageError

    name, equals, folder = artifact.partition("=")
    if not equals or Path(artifact).exists():
        name, folder = Path(artifact).resolve().name, artifact
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a model: take letters, digits, . _ and -, as in first={folder}"
        )
    return name, Path(folder)


def _example(manifest: dict[str, Any]) -> object:
    """An input that the model reads."""
    text, texts = "How do I sort a list?", manifest["schema"]["text_columns"]
    return (
        text if manifest["tabular"] is None else {name: text if name in texts else None for name in manifest["inputs"]}
    )
