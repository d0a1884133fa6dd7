"""Decisions in answers, and what is asked beside training, over a running service."""

import asyncio
import json
import shutil

import numpy as np
import pytest

from bertforge.data.schema import QUESTIONS
from bertforge.inference.codec import Codec
from bertforge.inference.predictor import Predictor
from bertforge.inference.threshold import Wanted, choose_thresholds
from bertforge.manifest import served
from bertforge.serving.classify import Classified, ModelCards
from bertforge.serving.counters import Counters
from bertforge.serving.monitor import Monitored
from bertforge.serving.preparing import Preparation
from tests.runs import made_up, reseal
from tests.serving.service import service, wait_until

PRIOR = {"closed": 0.3}


@pytest.fixture(scope="module")
def live(runs, data, tmp_path_factory):
    """A model with thresholds that reads columns, and one of an earlier version; two fronts."""
    folder = tmp_path_factory.mktemp("live")
    for name, kind in (("decides", "columns"), ("old", "full")):
        shutil.copytree(runs[kind], folder / name)
    usual = Predictor.load(folder / "decides", prior=PRIOR).predict(rows_of(60, 3))["probability"].median()
    choose_thresholds(folder / "decides", data, Wanted(costs={"open": 1.0}, person=1 - float(usual), prior=PRIOR))
    reseal(folder / "old", reference=None, label_shares=None)
    with service(folder / "log", folder / "decides", folder / "old", "--fronts", "2") as found:
        found.folder = folder
        wait_until(lambda: all(found.is_ready() for _ in range(10)), "both fronts, one of which each connection meets")
        yield found


def rows_of(count, seed):
    return made_up(count, seed)[list(QUESTIONS.required_columns)].drop(columns="OpenStatus")


def test_answers_hold_the_decisions_of_predict_where_thresholds_were_chosen(live):
    frame = rows_of(60, 3)
    found = Classified.model_validate_json(live.classify(frame.to_dict("records"), model="decides").text)
    expected = Predictor.load(live.folder / "decides").predict(frame)
    assert [row.decision for row in found.results] == expected["decision"].tolist()
    assert 10 < sum(row.decision == "abstain" for row in found.results) < 50
    np.testing.assert_allclose([row.probabilities["closed"] for row in found.results], expected["p_closed"], atol=2e-5)
    blank = frame.assign(Title="", BodyMarkdown="")[:1].to_dict("records")
    (result,) = live.classify(blank, model="decides").json()["results"]
    assert result["label"] is result["decision"] is None
    assert "decision" not in live.classify("a text", model="old").json()["results"][0]
    cards = ModelCards.model_validate_json(live.http.get("/v1/models").text).models
    assert cards[0].prior == pytest.approx({"open": 0.7, "closed": 0.3})
    assert cards[0].thresholds == Predictor.load(live.folder / "decides").manifest["decision"]["thresholds"]
    assert (cards[1].prior, cards[1].thresholds) == (None, None)


def test_the_monitor_adds_up_all_fronts(live):
    def told(model):
        return Monitored.model_validate_json(live.http.get("/v1/monitor", params={"model": model}).text)

    live.classify(["☃ ☃ ☃ ☃ ☃"], model="decides")
    wait_until(lambda: told("decides").rows > 0, "a row")
    before = told("decides").rows
    assert {each.drift for each in told("decides").quantities.values()} == {None}, "too few to compare"
    assert "bertforge_drift_psi{" not in live.http.get("/metrics").text
    many = told("decides").fewest
    odd = rows_of(many, 9).assign(ReputationAtPostCreation="900000", Title="☃ ☃ ☃ ☃", BodyMarkdown="☃")
    for start in range(0, many, 8):  # connections of their own, which the fronts share
        with live.connection() as http:
            rows = odd[start : start + 8].to_dict("records")
            assert http.post("/v1/classify", json={"inputs": rows, "model": "decides"}).status_code == 200
    wait_until(lambda: told("decides").rows == before + many, "rows of both fronts")
    found = told("decides").quantities
    assert {"tokens", "unknown tokens", "label", "column reputation", "column tags"} <= set(found)
    assert found["unknown tokens"].drift == found["column reputation"].drift == "much"
    assert found["unknown tokens"].psi > found["unknown tokens"].by_chance
    metrics = live.http.get("/metrics").text
    assert 'bertforge_drift_psi{model="decides",quantity="column reputation"}' in metrics
    assert 'bertforge_drift_by_chance{model="decides",quantity="tokens"}' in metrics
    live.classify("a text", model="old")
    assert "an earlier version trained it" in told("old").missing
    assert live.http.get("/v1/monitor", params={"model": "none"}).status_code == 404


def test_a_front_counts_what_it_answered_and_reads_what_others_wrote(runs, tmp_path):
    codec = Codec.load(*served(runs["full"]))

    async def ask(number, texts):
        counters = Counters(tmp_path / f"served-{number}.json")
        prepared = await Preparation(codec)(texts)
        counters.add("m", "g", codec, prepared, np.tile([0.0, 1.0], (len(texts), 1)))
        return counters

    async def both():
        first = await ask(1, ["☃ one", " "])
        first._write()
        second = await ask(2, ["two words"] * 3)
        return second.snapshots(), second.others()

    mine, others = asyncio.run(both())
    ((mine, other),) = zip(mine["m"].values(), others[0]["m"].values(), strict=True)
    assert (mine["rows"], other["rows"]) == ([3], [2])
    assert other["label"] == [0, 1, 1], "closed, and a row without text"
    assert sum(mine["unknown tokens"][1:]) == 0 < sum(other["unknown tokens"][1:]) == 1
    assert json.loads((tmp_path / "served-1.json").read_text())["m"]["g"] == other
