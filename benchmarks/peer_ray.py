"""Ray Serve with the peers' classifier: POST / {"input": text} -> {"scores": [...]}.

    python peer_ray.py MODEL WORK PORT BATCH

As its documentation has it: a deployment whose method `@serve.batch` gathers requests.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve

from peer_classifier import WAIT, classifier

model, work, port, batch = sys.argv[1:]


@serve.deployment(max_ongoing_requests=1024)
class Classify:
    """One replica, whose engine has all cores."""

    def __init__(self, model: str, work: str) -> None:
        self.classify = classifier(Path(model), Path(work))

    @serve.batch(max_batch_size=int(batch), batch_wait_timeout_s=WAIT)
    async def together(self, texts: list[str]) -> list[list[float]]:
        """A batch."""
        return self.classify(texts)

    async def __call__(self, request: Any) -> dict[str, list[float]]:
        """A request."""
        return {"scores": await self.together((await request.json())["input"])}


ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, configure_logging=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, logging_config={"enable_access_log": False})
serve.run(Classify.bind(model, work), route_prefix="/")
while True:
    time.sleep(1)
