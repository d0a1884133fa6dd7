"""LitServe with the peers' classifier: POST /predict {"input": text} -> {"scores": [...]}.

    python peer_litserve.py MODEL WORK PORT BATCH

As its documentation has it: a LitAPI whose batches the server makes, by `max_batch_size` and `batch_timeout`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve

from peer_classifier import WAIT, classifier


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Batches of texts."""

    def __init__(self, model: Path, work: Path, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=WAIT)
        self._folders = model, work

    def setup(self, device: str) -> None:
        """In the worker."""
        self.classify = classifier(*self._folders)

    def decode_request(self, request: dict[str, str]) -> str:
        """The text."""
        return request["input"]

    def predict(self, texts: Any) -> Any:
        """A list where batches are larger than one."""
        return self.classify(texts) if isinstance(texts, list) else self.classify([texts])[0]

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        """As it is sent."""
        return {"scores": output}


if __name__ == "__main__":
    model, work, port, batch = sys.argv[1:]
    server = litserve.LitServer(Api(Path(model), Path(work), int(batch)), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning", access_log=False)
