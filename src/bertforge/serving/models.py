"""The models that a front can ask: what the engine process serves, each with the codec of its folder.

The engine process says what it serves, and again whenever that changes. A front then reads the folders of the models it
does not know yet, in a thread, goes over to the new ones all at once and tells the engine that it did. A request whose
rows were prepared for a model that is gone by then is prepared anew, so none is lost in a swap.

`ready` is whether all of it is there: the connection and every model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.errors import ArtifactError, DataError, reason
from bertforge.inference.codec import Codec, is_blank
from bertforge.manifest import DECISION, identity, served
from bertforge.serving import metrics
from bertforge.serving.channel import AWAY, EngineClient, RefusedError, Served, State
from bertforge.serving.counters import Counters
from bertforge.serving.door import Call
from bertforge.serving.inputs import Columns, read_inputs
from bertforge.serving.preparing import Preparation, Prepared
from bertforge.serving.requests import RequestError
from bertforge.serving.settings import Limits

_STATUS = {"full": 429, "deadline": 504, "failed": 503, "unknown model": 503, "away": 503}
_SOON = 2.0  # seconds after which an engine that is away may be back
_AGAIN = 1.0  # seconds between attempts to read a folder


@dataclass(frozen=True)
class Model:
    """One that is served."""

    served: Served
    codec: Codec
    columns: Columns
    prepare: Preparation

    @classmethod
    def load(cls, model: Served, prior: Mapping[str, float] | None) -> Model:
        """Reads its folder; raises ArtifactError where that is damaged, or is no longer the one that was loaded."""
        folder, manifest = served(Path(model.folder))
        if identity(folder) != model.identity:
            raise ArtifactError(f"{folder} was changed since its engine was loaded; have it loaded: kill -HUP PID")
        codec = Codec.load(folder, {**manifest, DECISION: model.decision}, prior)
        return cls(model, codec, Columns.of(codec), Preparation(codec))

    @property
    def told(self) -> dict[str, str]:
        """How a response names it."""
        return {"name": self.served.name, "id": self.served.generation, "precision": self.served.precision}


@dataclass(frozen=True)
class Answers:
    """What a model says of the rows of a request, in their order."""

    model: Model
    prepared: Prepared
    probabilities: np.ndarray
    """[rows, labels] float32, calibrated; NaN for a row without text."""
    logits: np.ndarray
    """[rows, labels] float32, as the model gives them."""

    def results(self) -> list[dict[str, Any]]:
        """JSON-ready, one for each row."""
        codec, prepared = self.model.codec, self.prepared
        names, labels, policy = codec.label_names, codec.schema.original_labels(), codec.policy
        decisions = None if policy is None else policy.names(policy.decide(self.probabilities), labels)
        cut = np.maximum(0, prepared.whole - codec.max_length).tolist()
        found = []
        for row, chances in enumerate(self.probabilities.tolist()):
            blank = is_blank(prepared.texts[row])
            best = max(range(len(chances)), key=chances.__getitem__)
            result: dict[str, Any] = {
                "label": None if blank else labels[best],
                "probability": None if blank else chances[best],
                "probabilities": None if blank else dict(zip(names, chances, strict=True)),
                "tokens": min(int(prepared.lengths[row]), codec.max_length),
                "tokens_cut": cut[row],
            }
            if decisions is not None:
                result["decision"] = None if blank else decisions[row]
            if prepared.problems[row]:
                result["problem"] = prepared.problems[row]
            found.append(result)
        return found


class Models:
    """Those of the newest state of the engine process that this front has read the folders of."""

    def __init__(
        self,
        engine: Path,
        limits: Limits,
        log: Callable[[str], object],
        *,
        counters: Path,
        prior: Mapping[str, float] | None = None,
    ) -> None:
        """`engine` is the socket of the engine process, `log` is told what goes wrong, `counters` is a file of this
        front's own for `monitor`, and `prior` are the shares of labels in what is asked.
        """
        self.limits, self.counters, self._prior = limits, Counters(counters), prior
        self.client = EngineClient(engine, self._changed)
        self.ready = False
        self.models: dict[str, Model] = {}
        """By name, in the order of the command line."""
        self._log = log
        self._adopting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """In a running loop."""
        self.client.start()

    def get(self, name: str | None) -> Model:
        """A model by its name, or the first; raises RequestError."""
        if not self.ready:
            raise RequestError(503, AWAY, retry_after=_SOON)
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise RequestError(404, f"no model has this name; choose one of {', '.join(self.models)}", "model")
        return self.models[name]

    def full(self, client: str) -> bool:
        """Whether so much waits to be prepared that requests of `client` are refused."""
        return any(model.prepare.full(client) for model in self.models.values())

    async def answer(
        self,
        call: Call,
        inputs: Any,
        model: str | None = None,
        *,
        name: str = "inputs",
        deadline: float = np.inf,
        watched: bool = True,
    ) -> Answers:
        """What a model says of `inputs`, one input or a list, the value of the field `name` of a request.

        `deadline` is by `time.monotonic()`. Rows that nobody wrote are not `watched`: they count neither as answered
        nor in `/v1/monitor`. Raises RequestError.
        """
        while True:
            asked, began = self.get(model), time.monotonic()
            rows = read_inputs(inputs, asked.columns, self.limits, name)
            try:
                prepared = await asked.prepare(rows, call.client, deadline)
            except DataError as error:
                raise RequestError(422, str(error), name) from error
            metrics.stage("tokenize", time.monotonic() - began)
            if self.get(model) is asked:  # or it was swapped meanwhile
                break
        call.rows += len(rows)
        try:
            answer = await self.client.ask(
                asked.served.name, asked.served.generation, call.client,
                prepared.ids, prepared.lengths, prepared.columns, deadline,
            )  # fmt: skip
        except RefusedError as error:
            after = error.retry_after if error.reason == "full" else _SOON
            status = _STATUS[error.reason]
            raise RequestError(status, str(error), retry_after=None if status == 504 else after) from error
        metrics.stage("queue", answer.queued)
        metrics.stage("compute", answer.computed)
        if watched:
            metrics.rows(asked.served.name, len(rows))
            self.counters.add(asked.served.name, asked.served.generation, asked.codec, prepared, answer.logits)
        return Answers(asked, prepared, asked.codec.probabilities(prepared.texts, answer.logits), answer.logits)

    def _changed(self, state: State | None) -> None:
        if self._adopting is not None:
            self._adopting.cancel()
        self.ready = False if state is None else self.ready
        self._adopting = None if state is None else asyncio.create_task(self._adopt(state))

    async def _adopt(self, state: State) -> None:
        known = {(model.served.name, model.served.generation): model for model in self.models.values()}
        found: dict[str, Model] = {}
        for told in state.models:
            while told.name not in found:
                old = known.get((told.name, told.generation))
                try:
                    if old is not None and old.served == told:
                        found[told.name] = old
                    else:
                        found[told.name] = await asyncio.to_thread(Model.load, told, self._prior)
                except Exception as error:  # a folder may be anything
                    self._log(f"{told.name} cannot be read: {reason(error)}")
                    await asyncio.sleep(_AGAIN)
        self.models, self.ready = found, bool(found)
        self.client.adopted(state)
