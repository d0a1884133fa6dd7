"""A real `bertforge serve` on a free port, for the tests of what it does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 60.0  # seconds that a test waits for anything, on however busy a machine


def wait_until(true: Callable[[], object], what: str) -> None:
    """Returns once `true()` is; fails with `what` after PATIENCE."""
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.02)


class Service:
    """The processes, their log and an HTTP client."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log
        wait_until(lambda: "try it:" in self.said() or process.poll() is not None, "ready")
        assert process.poll() is None, self.said()
        self.address = re.search(r"http://\S+?:\d+", self.said())[0]  # type: ignore[index]
        self.http = httpx.Client(base_url=self.address, timeout=PATIENCE)

    def said(self) -> str:
        """All that the service wrote."""
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        """Its log of requests."""
        return [line for line in self._log_lines() if "path" in line]

    def events(self) -> list[str]:
        """What else the log tells of, by name."""
        return [line["event"] for line in self._log_lines() if "event" in line]

    def _log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]

    def classify(self, inputs: Any = "How do I sort a list?", **fields: Any) -> httpx.Response:
        """One request."""
        return self.http.post("/v1/classify", json={"inputs": inputs, **fields})

    def connection(self) -> httpx.Client:
        """A client of its own, which another front may serve."""
        return httpx.Client(base_url=self.address, timeout=PATIENCE)

    def processes(self, module: str) -> list[int]:
        """Ids of its processes that run a module."""
        found = []
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                if module in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(child)
        return found

    def is_ready(self) -> bool:
        """Whether it answers requests."""
        try:
            return httpx.get(f"{self.address}/readyz").status_code == 200
        except httpx.TransportError:  # the process that had the connection was killed
            return False

    def end(self) -> int:
        """As SIGTERM does; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def service(log: Path, *arguments: object) -> Iterator[Service]:
    """`bertforge serve ARGUMENTS` until the block ends."""
    command = [sys.executable, "-m", "bertforge", "serve", *map(str, arguments), "--port", "0"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT / "src")}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, text=True)
    try:
        yield Service(process, log)
    finally:
        if process.poll() is None:
            process.kill()  # the others end with their standard input
        process.wait(PATIENCE)
