"""The whole service: its processes, over HTTP."""

import os
import shutil
import signal
import socket
import threading
import time

import httpx
import numpy as np
import pytest

from bertforge.data.schema import QUESTIONS
from bertforge.inference.predictor import Predictor
from bertforge.serving.classify import Classified, ModelCards
from bertforge.serving.describe import Refused
from tests.runs import made_up, reseal
from tests.serving.service import PATIENCE, service, wait_until

KEY, OTHER = "web-key-0123456789", "batch-key-0123456789"
CLOSE = 2e-6  # float32, summed beside other rows
TEXTS = [f"How do I sort list {number} in {number % 7} ways?" for number in range(40)]


@pytest.fixture(scope="module")
def live(runs, tmp_path_factory):
    """A model of texts, one that reads columns, small limits and no keys."""
    folder = tmp_path_factory.mktemp("live")
    models = [f"text={runs['full']}", f"columns={runs['columns']}"]
    limits = ["--max-texts", "64", "--max-characters", "2000", "--max-body-mb", "0.0625"]
    with service(folder / "log", *models, *limits, "--fronts", "2", "--precision", "fp32") as found:
        yield found


@pytest.fixture(scope="module")
def expected(runs):
    """Probabilities of TEXTS, `[texts, labels]`, by the model itself."""
    predictor = Predictor.load(runs["full"], "fp32")
    return predictor.predict_proba(TEXTS).to_numpy()


def refused(response, status, field=None):
    """The message of an error, whose shape is that of the document."""
    assert response.status_code == status, response.text
    told = Refused.model_validate_json(response.text)
    assert told.error.field == field
    assert told.id == response.headers["x-request-id"]
    return told.error.message


def test_answers_are_those_of_predict(live, expected):
    response = live.classify([*TEXTS, " \n", "word " * 300])
    found = Classified.model_validate_json(response.text)
    assert found.id == response.headers["x-request-id"]
    assert (found.model.name, found.model.precision) == ("text", "fp32")
    *rows, blank, long = found.results
    chances = [[row.probabilities[name] for name in ("open", "closed")] for row in rows]
    np.testing.assert_allclose(chances, expected, atol=CLOSE)
    assert [row.label for row in rows] == [("open", "closed")[best] for best in expected.argmax(axis=1)]
    assert [row.probability for row in rows] == [max(both) for both in chances]
    assert all(row.tokens_cut == 0 for row in rows)
    assert (blank.label, blank.probability, blank.probabilities) == (None, None, None)
    assert (long.tokens, long.tokens_cut) == (48, 302 - 48)
    one = live.classify(TEXTS[3]).json()["results"]
    assert one[0]["probability"] == pytest.approx(rows[3].probability, abs=CLOSE)


def test_a_model_that_reads_columns_is_asked_by_its_name(live, runs):
    frame = made_up(20, seed=3)[list(QUESTIONS.required_columns)].drop(columns="OpenStatus")
    frame.loc[4, "PostCreationDate"] = "yesterday"
    found = live.classify(frame.to_dict("records"), model="columns").json()
    expected = Predictor.load(runs["columns"], "fp32").predict(frame)
    assert [row["label"] for row in found["results"]] == expected["label"].tolist()
    np.testing.assert_allclose([row["probability"] for row in found["results"]], expected["probability"], atol=CLOSE)
    assert "PostCreationDate" in found["results"][4]["problem"]
    assert "problem" not in found["results"][3]
    message = refused(live.classify("a text", model="columns"), 422, "inputs")
    assert "the model reads Title, BodyMarkdown" in message


def test_the_models_are_listed(live):
    text, columns = ModelCards.model_validate_json(live.http.get("/v1/models").text).models
    assert (text.name, text.kind, text.labels, text.columns) == ("text", "run", ["open", "closed"], [])
    assert (columns.max_length, "Tag1" in columns.columns) == (48, True)


def test_limits_hold_at_their_edges(live):
    assert live.classify(["a"] * 64).status_code == 200
    assert "the limit is 64" in refused(live.classify(["a"] * 65), 413, "inputs")
    assert live.classify("a " * 1000).status_code == 200
    assert "the limit is 2,000" in refused(live.classify(["b", "a" * 2001]), 413, "inputs[1]")
    body = b'{"inputs": "a"}'.ljust(1 << 16)
    headers = {"content-type": "application/json"}
    assert live.http.post("/v1/classify", content=body, headers=headers).status_code == 200
    for larger in (body + b" ", iter([body[:1000], body[1000:], b" "])):  # the second in chunks, without a length
        response = live.http.post("/v1/classify", content=larger, headers=headers)
        assert "larger than 0.0625 MiB" in refused(response, 413)
    deep = b'{"inputs": ' + b"[" * 16 + b"]" * 16 + b"}"
    assert "the limit is 16" in refused(live.http.post("/v1/classify", content=deep, headers=headers), 400)


def test_what_is_wrong_is_said_by_its_field(live):
    json_type = {"content-type": "application/json"}
    refused(live.http.post("/v1/classify", content=b"{", headers=json_type), 400)
    refused(live.http.post("/v1/classify", content=b"\xff", headers=json_type), 400)
    refused(live.http.post("/v1/classify", content=b'{"inputs": NaN}', headers=json_type), 400)
    refused(live.http.post("/v1/classify", content=b'{"inputs": 1, "inputs": 2}', headers=json_type), 400, "inputs")
    refused(live.http.post("/v1/classify", content=b'{"inputs": "\\ud800"}', headers=json_type), 422, "inputs")
    refused(live.http.post("/v1/classify", data={"inputs": "a"}), 415)
    refused(live.http.post("/v1/classify", content=b"{}", headers={**json_type, "content-encoding": "gzip"}), 415)
    refused(live.http.post("/v1/classify", json={}), 422, "inputs")
    assert "inputs, model, timeout_ms" in refused(live.classify("a", top_k=1), 422, "top_k")
    refused(live.classify("a", timeout_ms=0), 422, "timeout_ms")
    refused(live.classify("a", model=3), 422, "model")
    assert "choose one of text, columns" in refused(live.classify("a", model="other"), 404, "model")
    assert refused(live.http.get("/v1/classify"), 405) == "this address takes POST"
    assert refused(live.http.post("/page/page.js"), 405) == "this address takes GET, HEAD"
    for path in ("/v1/nowhere", "/v1/classify/"):
        refused(live.http.post(path, json={"inputs": "a"}), 404)


def test_a_request_keeps_its_id_and_gets_one_where_it_has_none(live):
    def told(given):
        return live.http.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"]

    assert told("job-7/é".replace("é", "e")) == "job-7/e"
    assert told("x" * 128) == "x" * 128
    for given in ("x" * 129, "two words", ""):
        assert len(told(given)) == 32
    assert told("") != told("")


def test_the_log_tells_of_each_request_and_of_no_text(live):
    secret = "a text that nobody else may read"
    for inputs in (secret, {secret: 1}, [1, secret]):
        live.classify(inputs, model="text")
    live.classify(secret, model="columns")
    live.http.get(f"/{secret}", params={"text": secret}, headers={"x-request-id": "the-last-one"})
    wait_until(lambda: any(line["id"] == "the-last-one" for line in live.lines()), "the line")
    line = next(line for line in live.lines() if line["id"] == "the-last-one")
    assert (line["method"], line["path"], line["status"], line["client"]) == ("GET", "unknown", 404, "127.0.0.1")
    assert line["ms"] > 0
    assert "nobody" not in live.said()
    assert any(line["path"] == "/v1/classify" and line["rows"] == 1 for line in live.lines())


def test_the_metrics_are_those_of_all_fronts(live):
    def count(name):
        text = live.http.get("/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    before = count('bertforge_requests_total{path="/v1/classify",status="200"}'), count("bertforge_rows_total")
    for _ in range(20):  # by new connections, which different fronts take
        httpx.post(f"{live.address}/v1/classify", json={"inputs": ["a", "b"]}, timeout=PATIENCE)
    after = count('bertforge_requests_total{path="/v1/classify",status="200"}'), count("bertforge_rows_total")
    assert (after[0] - before[0], after[1] - before[1]) == (20, 40)
    assert live.http.post("/v1/explain", json={"inputs": "how do I sort a list"}).status_code == 200
    assert count("bertforge_rows_total") == after[1] + 1, "what it asked itself"
    refused(live.classify([]), 422, "inputs")
    assert count('bertforge_refusals_total{reason="invalid_field"}') >= 1
    for stage in ("read", "tokenize", "queue", "compute", "write"):
        assert count(f'bertforge_stage_seconds_count{{stage="{stage}"}}') >= 20
    wait_until(lambda: count("bertforge_batch_tokens_total") > 0, "the engine's counts")


def test_the_document_describes_the_routes(live):
    document = live.http.get("/openapi.json").json()
    classify = document["paths"]["/v1/classify"]["post"]
    statuses = {"200", "400", "401", "404", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert set(classify["responses"]) == statuses
    schema = classify["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"inputs", "model", "timeout_ms"}
    assert {"/v1/models", "/healthz", "/readyz", "/metrics"} <= set(document["paths"])
    assert live.http.get("/docs").status_code == 404, "a page that loads from elsewhere"


def test_a_front_that_is_killed_is_replaced_and_the_other_goes_on(live):
    killed, other = live.processes("serving.front")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(live.processes("serving.front")) == 2, "another front")
    wait_until(lambda: "process_restarted" in live.events(), "said")
    assert other in live.processes("serving.front")
    wait_until(lambda: all(live.is_ready() for _ in range(20)), "both are ready")
    assert live.classify("a").status_code == 200
    counted = 'bertforge_restarts_total{process="front"} 1.0'
    wait_until(lambda: counted in live.http.get("/metrics").text, "it counts itself once it has begun")
    assert 'bertforge_swaps_total{result="failed"} 0.0' in live.http.get("/metrics").text, "or it would not increase"


def test_an_engine_that_is_killed_answers_503_and_comes_back(live):
    (engine,) = live.processes("serving.process")
    os.kill(engine, signal.SIGSTOP)  # so that requests are with it when it dies
    found = []
    asking = [threading.Thread(target=lambda: found.append(live.classify("a"))) for _ in range(5)]
    for thread in asking:
        thread.start()
    wait_until(lambda: live.http.get("/healthz").status_code == 200, "fronts go on")
    os.kill(engine, signal.SIGKILL)
    for thread in asking:
        thread.join(PATIENCE)
    assert [refused(response, 503) for response in found]
    assert all(int(response.headers["retry-after"]) >= 1 for response in found)
    wait_until(lambda: all(live.is_ready() for _ in range(20)), "back")
    assert live.classify("a").status_code == 200


def test_a_request_that_waits_too_long_or_hangs_up_is_left(live):
    (engine,) = live.processes("serving.process")
    os.kill(engine, signal.SIGSTOP)
    try:
        assert "by the deadline" in refused(live.classify("a", timeout_ms=30), 504)
        host, port = live.address.removeprefix("http://").split(":")
        body = b'{"inputs": "a"}'
        with socket.create_connection((host, int(port))) as gone:
            head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone\r\nContent-Length: %d\r\n\r\n"
            gone.sendall(head % len(body) + body)
            time.sleep(0.1)
        wait_until(lambda: any(line["id"] == "gone" for line in live.lines()), "the line of who hung up")
    finally:
        os.kill(engine, signal.SIGCONT)
    (line,) = [line for line in live.lines() if line["id"] == "gone"]
    assert (line["status"], line["rows"]) == (499, 1)
    assert live.classify("a").status_code == 200


def sharp(run, folder):
    """A copy whose probabilities are far apart."""
    shutil.copytree(run, folder)
    reseal(folder, temperature=0.1)


@pytest.fixture(scope="module")
def kept(runs, tmp_path_factory):
    """A model of its own, and keys."""
    folder = tmp_path_factory.mktemp("kept")
    sharp(runs["full"], folder / "model")
    (folder / "keys").write_text(f"web {KEY}\nbatch {OTHER}\n")
    with service(folder / "log", folder / "model", "--api-keys", folder / "keys", "--precision", "fp32") as found:
        yield found, folder


def test_keys_are_asked_for_and_name_the_client(kept):
    live, _ = kept
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert live.http.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/nowhere"):
        refused(live.http.get(path), 401)
    response = live.classify("a")
    assert KEY not in refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"
    for key, name in ((KEY, "web"), (OTHER, "batch")):
        headers = {"authorization": f"Bearer {key}", "x-request-id": name}
        assert live.http.post("/v1/classify", json={"inputs": "a"}, headers=headers).status_code == 200
        wait_until(lambda name=name: [line for line in live.lines() if line["id"] == name], "the line")
    assert [line["client"] for line in live.lines() if line["id"] in ("web", "batch")] == ["web", "batch"]
    assert KEY not in live.said()


class Asking(threading.Thread):
    """A client that asks again and again until it finds nobody to connect to, and compares every answer."""

    def __init__(self, live, number, texts, answers):
        super().__init__()
        self.address, self.number, self.texts, self.answers = live.address, number, texts, answers
        self.lost, self.wrong, self.models = list[str](), list[str](), set[str]()

    def run(self):
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=self.address, timeout=PATIENCE, headers=headers) as http:
            while True:
                self.number += 1
                rows = [self.number % len(self.texts), (self.number + 11) % len(self.texts)]
                try:
                    told = http.post("/v1/classify", json={"inputs": [self.texts[row] for row in rows]})
                except httpx.ConnectError:
                    return
                except httpx.TransportError as error:
                    self.lost.append(repr(error))
                    return
                if told.status_code != 200:
                    self.lost.append(told.text)
                    return
                found = told.json()
                self.models.add(found["model"]["id"])
                chances = [result["probabilities"]["open"] for result in found["results"]]
                if not any(np.allclose(chances, one[rows, 0], rtol=0, atol=1e-4) for one in self.answers):
                    self.wrong.append(f"{rows}: {chances}")


def test_a_folder_is_swapped_under_load_and_what_is_accepted_is_answered(kept, runs, tmp_path):
    """SIGHUP, SIGHUP with a folder that is broken, then SIGTERM, while clients ask."""
    live, folder = kept
    sharp(runs["lora"], tmp_path / "other")
    both = [
        Predictor.load(path, "fp32").predict_proba(TEXTS).to_numpy() for path in (folder / "model", tmp_path / "other")
    ]
    apart = np.flatnonzero(np.abs(both[0] - both[1]).max(axis=1) > 1e-3)
    assert len(apart) > 12, "or a swap could not be seen"
    texts, answers = [TEXTS[row] for row in apart], [chances[apart] for chances in both]
    asking = [Asking(live, 10 * number, texts, answers) for number in range(4)]
    for client in asking:
        client.start()

    def seen():
        assert all(client.is_alive() for client in asking), [client.lost for client in asking]
        return set().union(*(client.models for client in asking))

    wait_until(lambda: len(seen()) == 1, "answers")
    shutil.rmtree(folder / "model")
    (tmp_path / "other").rename(folder / "model")
    (folder / "keys").write_text(f"web {KEY}\n")
    live.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(seen()) == 2, "answers of the other model")
    gone = httpx.get(f"{live.address}/v1/models", headers={"authorization": f"Bearer {OTHER}"})
    refused(gone, 401)  # the keys were read again
    (folder / "model" / "tokenizer.json").write_text("{}")
    (folder / "keys").write_text("web\n")
    live.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "tokenizer.json is damaged" in live.said(), "the broken folder is refused")
    wait_until(lambda: "the keys stay as they were: line 1" in live.said(), "so are the keys")
    assert len(seen()) == 2, "those before go on"
    metrics = httpx.get(f"{live.address}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    for result in ("done", "failed"):
        assert f'bertforge_swaps_total{{result="{result}"}} 1.0' in metrics
    assert {"swapped", "swap_failed", "keys_kept"} <= set(live.events())
    assert live.end() == 0
    assert live.events()[-1] == "ended"
    assert "ending" in live.events()
    for client in asking:
        client.join(PATIENCE)
        assert (client.lost, client.wrong) == ([], [])
