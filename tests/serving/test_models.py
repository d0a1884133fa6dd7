"""A front without its processes: the app behind the door, and an engine whose answers the test makes."""

import asyncio
import json
import math
import shutil
from dataclasses import replace

import httpx
import numpy as np
import pytest

from bertforge.artifact import hash_file
from bertforge.errors import ArtifactError
from bertforge.evaluation.decisions import Policy
from bertforge.manifest import DECISION, MANIFEST, amend_manifest, identity, read_manifest
from bertforge.serving import models as model_files
from bertforge.serving.channel import Answer, RefusedError, Served, State
from bertforge.serving.describe import Refused
from bertforge.serving.door import Door
from bertforge.serving.front import FORMS, make_app
from bertforge.serving.models import Model, Models
from bertforge.serving.settings import Limits
from tests.runs import reseal


def served(folder, name="text"):
    return Served(
        name, hash_file(folder / MANIFEST), str(folder), "fp32", "pytorch", "a CPU", identity=identity(folder)
    )


class Engine:
    """Answers each ask as `does` says, and keeps what it was asked."""

    def __init__(self, does=None):
        self.does, self.asked, self.adopted_states, self.loads = does, [], [], {}

    async def ask(self, model, generation, client, ids, lengths, columns=None, deadline=math.inf):
        self.asked.append((model, generation, client, lengths.tolist()))
        if self.does is not None:
            await self.does()
        return Answer(0, np.zeros((len(lengths), 2), np.float32), 0.001, 0.002)

    def adopted(self, state):
        self.adopted_states.append(state.number)


@pytest.fixture
def said():
    return []


@pytest.fixture
def front(runs, tmp_path, said):
    """Models with one of texts, and a door before them."""

    def make(does=None):
        models = Models(tmp_path / "engine", Limits(), said.append, counters=tmp_path / "counters-1.json")
        models.client = Engine(does)
        model = Model.load(served(runs["full"]), None)
        models.models, models.ready = {"text": model}, True
        return models, Door(make_app(models), Limits(), None, FORMS, log=said.append)

    return make


def ask(door, path="/v1/classify", **fields):
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://front") as http:
            return await http.post(path, json={"inputs": ["a", "b c"], **fields})

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status", "after"),
    [
        (RefusedError("full", "the queue is full", 0.3), 429, "1"),
        (RefusedError("full", "the queue is full", 2.1), 429, "3"),
        (RefusedError("deadline", "too late"), 504, None),
        (RefusedError("failed", "the engine failed"), 503, "2"),
        (RefusedError("away", "the engine is away"), 503, "2"),
    ],
)
def test_what_the_engine_refuses_is_told_with_its_status(front, error, status, after):
    async def refuse():
        raise error

    response = ask(front(refuse)[1])
    told = Refused.model_validate_json(response.text)
    assert (response.status_code, response.headers.get("retry-after")) == (status, after)
    assert (told.error.message, told.error.field) == (f"{error}; try again in {after} s" if after else str(error), None)


TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a secret text"]}
OPEN_INFERENCE, TEI = ("/v2/models/text/infer", [TENSOR]), ("/predict", "a secret text")


@pytest.mark.parametrize(
    ("asked", "error", "status", "told"),
    [
        (OPEN_INFERENCE, RefusedError("full", "said", 3), 429, {"error": "said; try again in 3 s"}),
        (OPEN_INFERENCE, RefusedError("failed", "said"), 503, {"error": "said; try again in 2 s"}),
        (OPEN_INFERENCE, KeyError("a secret text"), 500, {"error": "the service failed over this request"}),
        (TEI, RefusedError("full", "said", 3), 429, {"error": "said; try again in 3 s", "error_type": "Overloaded"}),
        (TEI, RefusedError("away", "said"), 503, {"error": "said; try again in 2 s", "error_type": "Unhealthy"}),
        (
            TEI,
            KeyError("a secret text"),
            500,
            {"error": "the service failed over this request", "error_type": "Backend"},
        ),
    ],
)
def test_another_protocol_has_the_same_refusals_in_its_own_form(front, asked, error, status, told):
    async def refuse():
        raise error

    path, inputs = asked
    response = ask(front(refuse)[1], path, inputs=inputs)
    assert (response.status_code, response.json()) == (status, told)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_a_defect_of_ours_is_500_and_the_log_says_where_without_the_text(front, said):
    async def fail():
        raise KeyError("a secret text")

    response = ask(front(fail)[1])
    assert Refused.model_validate_json(response.text).error.code == "internal"
    assert response.status_code == 500
    defect, request = map(json.loads, said)
    assert (defect["error"], request["status"]) == ("KeyError", 500)
    assert "test_models.py" in defect["where"][-1]
    assert "secret" not in str(said)


def test_the_engine_is_asked_for_the_client_and_nobody_else(front):
    models, door = front()
    assert ask(door).status_code == 200
    assert models.client.asked == [("text", models.models["text"].served.generation, "127.0.0.1", [3, 4])]


def swapping(models, runs):
    """Another model, which comes while the rows of the first request are prepared, and what was prepared before."""
    old, new = models.models["text"], Model.load(served(runs["lora"]), None)
    prepare, prepared = old.prepare, []

    class Swapping:
        async def __call__(self, rows, *rest):
            found = await prepare(rows, *rest)
            prepared.append(rows)
            models.models = {"text": new}
            return found

    object.__setattr__(old, "prepare", Swapping())
    return new, prepared


def test_rows_that_were_prepared_for_a_model_that_is_gone_are_prepared_anew(front, runs):
    models, door = front()
    new, prepared = swapping(models, runs)
    assert ask(door).json()["model"]["id"] == new.served.generation
    assert len(prepared) == 1
    assert [generation for _, generation, *_ in models.client.asked] == [new.served.generation]


def test_an_explanation_of_a_model_that_is_gone_begins_anew(front, runs):
    models, door = front()
    new, _ = swapping(models, runs)
    response = ask(door, "/v1/explain", inputs="one two three")
    assert response.json()["model"]["id"] == new.served.generation
    assert [word["text"] for word in response.json()["words"]] == ["one", "two", "three"]


def test_a_version_that_is_swapped_for_another_does_not_answer_as_it(front, runs):
    models, door = front()
    version = models.models["text"].served.generation
    swapping(models, runs)
    response = ask(door, f"/v2/models/text/versions/{version}/infer", inputs=[TENSOR])
    assert (response.status_code, "no such version" in response.json()["error"]) == (404, True)


def adopt(models, *states):
    async def run():
        for state in states:
            models._changed(state)
        if models._adopting is not None:
            await asyncio.wait([models._adopting], timeout=60)

    asyncio.run(run())


def test_a_new_state_is_adopted_whole_and_models_that_stay_are_kept(front, runs):
    models, _ = front()
    before = models.models["text"]
    adopt(models, State(2, (before.served, served(runs["columns"], "columns"))))
    assert list(models.models) == ["text", "columns"]
    assert models.models["text"] is before
    assert models.client.adopted_states == [2]


def test_without_an_engine_nothing_is_ready(front):
    models, door = front()
    before = models.models["text"]
    adopt(models, None)
    assert ask(door).status_code == 503
    adopt(models, State(1, (before.served,)))
    assert ask(door).status_code == 200


def test_a_folder_that_nobody_can_read_is_said_and_tried_again(front, monkeypatch, said):
    models, _ = front()
    known = models.models["text"].served
    monkeypatch.setattr(model_files, "_AGAIN", 0.0)
    load, tries = Model.load, []

    def damaged(told, prior):
        tries.append(told)
        if len(tries) == 1:
            raise KeyError("labels")  # of a manifest that somebody changed
        return load(told, prior)

    monkeypatch.setattr(Model, "load", damaged)
    adopt(models, State(2, (replace(known, name="other"),)))
    assert said == ["other cannot be read: KeyError: 'labels'"]
    assert list(models.models) == ["other"]


def test_a_folder_that_was_changed_since_is_not_read(runs):
    changed = replace(served(runs["full"]), identity="sha256:another")
    with pytest.raises(ArtifactError, match="was changed since its engine was loaded"):
        Model.load(changed, None)


def test_thresholds_that_are_chosen_anew_are_taken_when_the_folder_is_loaded_again_and_no_earlier(runs, tmp_path):
    folder = shutil.copytree(runs["full"], tmp_path / "model")
    told, chosen = served(folder), Policy(("open", "closed"), (0.9, 0.9)).to_dict()
    amend_manifest(folder, {**read_manifest(folder, "run"), DECISION: chosen})
    assert Model.load(told, None).codec.policy is None, "as in the fronts that read the folder before"
    loaded = replace(told, decision=Policy(("open", "closed"), (0.7, 0.3)).to_dict())
    assert Model.load(loaded, None).codec.policy.thresholds == (0.7, 0.3)
    reseal(folder, temperature=3.0)
    with pytest.raises(ArtifactError, match="was changed since its engine was loaded"):
        Model.load(told, None)
