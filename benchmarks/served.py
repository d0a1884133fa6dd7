"""What the parts of serve.py share: real questions, their right answers, the service, and the load on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import numpy as np
from tests.serving.service import Service, service

from bertforge.data.prepared import PreparedData
from bertforge.inference.predictor import Predictor
from load import Outcome, Plan, joined, run, spread

CLOSE = 0.01
"""Of a probability: an engine in 8 bits sums a little differently beside other rows."""
_SETTLE = 0.2  # of the seconds of a closed loop, before its rate counts


@dataclass(frozen=True)
class Setup:
    """An engine, and questions in a random order."""

    engine: Path
    predictor: Predictor
    texts: list[str]
    seconds: float
    """Of one measure."""
    connections: int
    """Of a closed loop with one text a request."""
    processes: int
    """That load comes from."""
    fronts: int | None
    """None is the service's own choice."""

    @classmethod
    def make(cls, engine: Path, prepared: Path, texts: int, *rest: float) -> Setup:
        """The first questions of the validation rows, in a random order; `rest` are the other fields."""
        data = PreparedData.open(prepared)
        rows = np.random.default_rng(0).permutation(data.rows("random", "validation"))[:texts]
        return cls(engine, Predictor.load(engine), data.texts(rows), *rest)  # type: ignore[arg-type]

    @contextmanager
    def serve(self, *flags: object) -> Iterator[Service]:
        """The service, as `bertforge serve` is started, until the block ends."""
        fronts = () if self.fronts is None or "--fronts" in flags else ("--fronts", self.fronts)
        with TemporaryDirectory() as folder, service(Path(folder) / "log", self.engine, *fronts, *flags) as found:
            yield found

    def bodies(self, each: int = 1) -> list[bytes]:
        """Of requests with so many texts."""
        texts = self.texts
        starts = range(0, len(texts) - each + 1, each)
        return [json.dumps({"inputs": texts[i] if each == 1 else texts[i : i + each]}).encode() for i in starts]

    def plan(self, served: Service, bodies: Sequence[bytes], **fields: object) -> Plan:
        """A load on the service; without `rate` a closed loop of all connections."""
        address = urlsplit(served.address)
        assert address.hostname
        assert address.port
        fields.setdefault("seconds", self.seconds)
        return Plan(address.hostname, address.port, bodies, **fields)  # type: ignore[arg-type]

    def load(self, plan: Plan) -> Outcome:
        """From all processes."""
        return joined(run(*spread(plan, self.processes)))

    def saturated(self, served: Service, each: int = 1) -> tuple[float, Outcome]:
        """Questions answered a second in a closed loop of requests with `each` texts."""
        connections = max(4, self.connections * 4 // each) if each > 1 else self.connections
        found = self.load(self.plan(served, self.bodies(each), connections=connections))
        return each * found.rate(self.seconds, _SETTLE * self.seconds), found

    @cached_property
    def right(self) -> np.ndarray:
        """`[texts, 1 + labels]`: tokens and probabilities, by `Predictor`."""
        _, offsets = self.predictor.tokenizer.encode(self.texts)
        tokens = np.minimum(np.diff(offsets), self.predictor.max_length)
        chances = self.predictor.predict_proba(self.texts).to_numpy()
        return np.column_stack([tokens, chances])

    def wrong(self, found: Outcome, shift: int = 0) -> int:
        """Answers to single texts that are not those of their text, or carry another request's id.

        With a `shift`, how many would be seen as wrong if every one had been given the answer of another text.
        """
        names, count = self.predictor.label_names, 0
        for place in np.flatnonzero(found.status == 200):
            told = json.loads(found.answers[place])
            (result,) = told["results"]
            values = np.array([result["tokens"], *(result["probabilities"][name] for name in names)])
            right = self.right[(found.body[place] + shift) % len(self.texts)]
            count += told["id"] != found.ids[place] or bool(np.abs(values - right).max() > CLOSE)
        return count


def percentiles(milliseconds: np.ndarray) -> dict[str, float]:
    """p50 and p99, for a row of the record."""
    if not len(milliseconds):
        return {}
    p50, p99 = np.percentile(milliseconds, [50, 99]).tolist()
    return {"p50_ms": p50, "p99_ms": p99}
