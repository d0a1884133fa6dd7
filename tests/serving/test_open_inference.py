"""`/v2`, asked by Triton's own client and by hand."""

import json
import re

import numpy as np
import pytest
import tritonclient.http as http

from bertforge.data.schema import QUESTIONS
from bertforge.inference.predictor import Predictor
from bertforge.serving.open_inference import Description, InferResponse, Refused
from tests.runs import made_up
from tests.serving.service import PATIENCE

CLOSE = 2e-6  # float32, summed beside other rows
TEXTS = ["How do I sort a list?", "Größe und Maße 🙂", " ", "word " * 100]
HEADER = "inference-header-content-length"


@pytest.fixture(scope="module")
def client(protocols):
    key = {"authorization": protocols.http.headers["authorization"]}
    found = http.InferenceServerClient(
        protocols.address.removeprefix("http://"), network_timeout=PATIENCE, connection_timeout=PATIENCE
    )

    class Keyed:
        """Sends the key with each call, each in a dict of its own, for the client adds to it."""

        def __getattr__(self, name):
            call = getattr(found, name)
            return lambda *given, **named: call(*given, headers={**key}, **named)

    yield Keyed()
    found.close()


def tensor(name, values, *, shape=None, binary=True, datatype=None):
    values = np.asarray(values, dtype=object if datatype is None else None).reshape(shape or len(values))
    found = http.InferInput(name, list(values.shape), datatype or "BYTES")
    return found.set_data_from_numpy(values, binary_data=binary)


def message(response, status):
    """That of an error in the protocol's form."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    return Refused.model_validate_json(response.text).error


def infer(protocols, *tensors, **fields):
    return protocols.http.post("/v2/models/text/infer", json={"inputs": tensors, **fields})


def texts(*data, **fields):
    return {"name": "text", "shape": [len(data)], "datatype": "BYTES", "data": data, **fields}


@pytest.mark.parametrize("sent_binary", [True, False])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_tritons_client_gets_the_answers_of_predict(client, runs, sent_binary, shape):
    expected = Predictor.load(runs["full"], "fp32").predict(TEXTS)
    sent = tensor("text", TEXTS, shape=shape, binary=sent_binary)
    for outputs in (
        None,  # all, as bytes
        [http.InferRequestedOutput(name, binary_data=False) for name in ("label", "probability", "probabilities")],
    ):
        found = client.infer("text", [sent], outputs=outputs, request_id="7")
        assert found.get_response()["id"] == "7"
        labels = [label.decode() if isinstance(label, bytes) else label for label in found.as_numpy("label")]
        assert labels == expected["label"].fillna("").tolist()
        np.testing.assert_allclose(found.as_numpy("probability"), expected["probability"], atol=CLOSE)
        chances = found.as_numpy("probabilities")
        np.testing.assert_allclose(chances, expected[["p_open", "p_closed"]], atol=CLOSE)
        assert (chances.dtype, np.isnan(chances[2]).all()) == (np.float32, True)


def test_columns_are_a_tensor_each_of_texts_or_numbers(client, runs):
    frame = made_up(6, seed=3)[list(QUESTIONS.required_columns)].drop(columns="OpenStatus")
    frame.loc[2, "ReputationAtPostCreation"] = ""
    expected = Predictor.load(runs["columns"], "fp32").predict(frame)
    named = [kind["name"] for kind in client.get_model_metadata("columns")["inputs"]]
    as_texts = {name: tensor(name, frame[name]) for name in named}
    reputation = [float(value or "nan") for value in frame["ReputationAtPostCreation"]]
    answers = [int(value) for value in frame["OwnerUndeletedAnswerCountAtPostTime"]]
    as_numbers = {
        "ReputationAtPostCreation": tensor("ReputationAtPostCreation", reputation, datatype="FP64", shape=(6, 1)),
        "OwnerUndeletedAnswerCountAtPostTime": tensor(
            "OwnerUndeletedAnswerCountAtPostTime", answers, datatype="INT64", binary=False
        ),
    }
    for tensors in (as_texts, as_texts | as_numbers):
        found = client.infer("columns", [*tensors.values()])
        assert [label.decode() for label in found.as_numpy("label")] == expected["label"].tolist()
        np.testing.assert_allclose(found.as_numpy("probability"), expected["probability"], atol=CLOSE)
    with pytest.raises(http.InferenceServerException, match="there is no tensor Tag1; the model reads Title, Body"):
        client.infer("columns", [one for name, one in as_texts.items() if name != "Tag1"])


def test_the_service_and_its_models_describe_themselves(protocols, client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert (client.is_model_ready("text"), client.is_model_ready("other")) == (True, False)
    told = Description.model_validate(client.get_model_metadata("text"))
    (listed, _) = protocols.http.get("/v1/models").json()["models"]
    assert told.versions == [listed["id"]]
    assert [(kind.name, kind.datatype, kind.shape) for kind in told.inputs] == [("text", "BYTES", [-1])]
    assert [kind.shape for kind in told.outputs] == [[-1], [-1], [-1, 2]]


def test_a_model_with_thresholds_gives_decisions(server):
    """The model of these tests always wants a person."""
    described = Description.model_validate_json(server.http.get("/v2/models/sure").text)
    assert [kind.name for kind in described.outputs] == ["label", "probability", "probabilities", "decision"]
    sent = [{"name": kind.name, "shape": [1], "datatype": "BYTES", "data": ["1"]} for kind in described.inputs]
    told = server.http.post("/v2/models/sure/infer", json={"inputs": sent}).json()
    assert told["outputs"][3] == {"name": "decision", "shape": [1], "datatype": "BYTES", "data": ["abstain"]}


def test_a_version_is_the_model_that_was_asked_for(client):
    (version,) = client.get_model_metadata("text")["versions"]
    sent = [tensor("text", TEXTS)]
    assert client.is_model_ready("text", version)
    assert client.infer("text", sent, model_version=version).get_response()["model_version"] == version
    with pytest.raises(http.InferenceServerException, match="no such version of text; there is sha256:") as refused:
        client.infer("text", sent, model_version="1")
    assert refused.value.status() == "404"


def test_refusals_have_the_protocols_form(protocols, client):
    with pytest.raises(http.InferenceServerException, match="choose one of text, columns") as refused:
        client.infer("other", [tensor("text", TEXTS)])
    assert refused.value.status() == "404"
    body = json.dumps({"inputs": [texts("a")]}).encode()
    path, kind = "/v2/models/text/infer", {"content-type": "application/json"}
    assert "no key" in message(protocols.http.get("/v2", headers={"authorization": "Bearer nobody"}), 401)
    assert "larger than 0.0625 MiB" in message(
        protocols.http.post(path, content=body.ljust(1 << 17), headers=kind), 413
    )
    assert "the limit is 64" in message(infer(protocols, texts(*["a"] * 65)), 413)
    strange = {"content-type": "text/plain", "origin": "http://a.strange.page"}
    assert "the body is text/plain" in message(protocols.http.post(path, content=body, headers=strange), 415)
    message(protocols.http.get("/v2/nowhere"), 404)
    message(protocols.http.get(path), 405)
    message(protocols.http.post(path, content=b"{", headers=kind), 400)
    assert "from 1 to 600000000" in message(infer(protocols, texts("a"), parameters={"timeout": 0}), 422)
    assert "by the deadline" in message(infer(protocols, texts("a"), parameters={"timeout": 1}), 504)
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert protocols.http.get(path, headers={"authorization": ""}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "inputs is no list"),
        ({"inputs": {}}, "inputs is no list"),
        ({"inputs": [1]}, "inputs is no list of objects"),
        ({"inputs": []}, "there is no tensor text"),
        ({"inputs": [texts()]}, "text is empty"),
        ({"inputs": [texts("a"), texts("b")]}, "inputs[1] is text once more"),
        ({"inputs": [texts("a") | {"name": "Title"}]}, "inputs[0] is no tensor of the model; it reads text"),
        ({"inputs": [texts("a") | {"name": ["text"]}]}, "inputs[0] is no tensor"),
        ({"inputs": [texts("a", shape=[2])]}, "text has 1 cells, but its shape says 2"),
        ({"inputs": [texts("a", shape=[])]}, "shape of text is not [rows]"),
        ({"inputs": [texts("a", shape=[1, 2])]}, "shape of text is not [rows]"),
        ({"inputs": [texts("a", shape=[1, 1, 1])]}, "shape of text is not [rows]"),
        ({"inputs": [texts("a", shape=[True])]}, "begins with no whole number"),
        ({"inputs": [texts("a", shape=[-1])]}, "begins with no whole number"),
        ({"inputs": [texts("a", datatype="STRING")]}, "datatype of text is none of BYTES, BOOL"),
        ({"inputs": [texts("a", datatype="FP32")]}, "text[0] is a text, but its datatype is FP32"),
        ({"inputs": [texts(1)]}, "text[0] is a number, but its datatype is BYTES"),
        ({"inputs": [texts(None)]}, "text[0] is null"),
        ({"inputs": [texts(1, datatype="INT64")]}, "text[0] is a number; send a text"),
        ({"inputs": [texts({"text": "a"})]}, "text[0] is an object, but its datatype is BYTES"),
        ({"inputs": [texts([["a"]])]}, "text[0] is a list"),
        ({"inputs": [texts("a", data="a")]}, "text has no list of data"),
        ({"inputs": [texts("a", parameters=1)]}, "the parameters of inputs[0] are a number"),
        ({"inputs": [texts("a", parameters={"shared_memory_region": "r"})]}, "parameter shared_memory_region"),
        ({"inputs": [texts("a")], "parameters": {"priority": 1}}, "the request has the parameter priority"),
        ({"inputs": [texts("a")], "outputs": [{"name": "logits"}]}, "outputs[0] names no tensor of the model; it has"),
        ({"inputs": [texts("a")], "outputs": 1}, "outputs is no list"),
        ({"inputs": [texts("a")], "id": 7}, "id is a number"),
        ({"inputs": [texts("a")], "model_name": "other"}, "model_name is not text"),
        ({"inputs": [texts("a")], "input": 1}, "unknown field input; this request takes"),
    ],
)
def test_a_tensor_that_is_none_is_named(protocols, fields, said):
    assert said in message(protocols.http.post("/v2/models/text/infer", json=fields), 422)


def test_what_clients_of_other_servers_send_beside_is_taken(protocols):
    told = infer(protocols, texts("a", parameters={"content_type": "str"}), model_name="text", outputs=[])
    answer = InferResponse.model_validate_json(told.text)
    assert (answer.id, [output.name for output in answer.outputs]) == (None, ["label", "probability", "probabilities"])
    natural = infer(protocols, texts("a", "b") | {"shape": [2, 1], "data": [["a"], ["b"]]})
    assert InferResponse.model_validate_json(natural.text).outputs[2].shape == [2, 2]


def test_any_type_of_body_is_taken_as_triton_does(protocols):
    body = json.dumps({"inputs": [texts("a")]}).encode()
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        assert protocols.http.post("/v2/models/text/infer", content=body, headers=kind).status_code == 200


def behind(*blobs, size=None, shape=(1,), datatype="BYTES", header=None):
    """A body with bytes behind its JSON, and its headers."""
    blob = b"".join(blobs)
    parameters = {"binary_data_size": len(blob) if size is None else size}
    head = json.dumps({"inputs": [texts("a", shape=shape, datatype=datatype, parameters=parameters)]}).encode()
    return head + blob, {HEADER: str(len(head)) if header is None else header}


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (behind(b"\1\0\0\0a", header="-1"), 400, "no number up to"),
        (behind(b"\1\0\0\0a", header="9" * 5000), 400, "no number up to"),
        (behind(b"\1\0\0\0a", header="99999"), 400, "no number up to"),
        (behind(b"\1\0\0\0a", header="0"), 400, "the body is empty"),
        (behind(b"\1\0\0\0a", size=6), 400, "binary_data_size of text is no number up to 5"),
        (behind(b"\1\0\0\0a", size=-1), 400, "binary_data_size of text is no number up to 5"),
        (behind(b"\1\0\0\0a", size=4), 400, "text[0] is longer than the bytes"),
        (behind(b"\1\0\0\0a", b"b", size=5), 400, "1 bytes belong to no tensor"),
        (behind(b"\xff\xff\xff\xffa"), 400, "text[0] is longer than the bytes"),
        (behind(b"\1\0"), 400, "text[0] is longer than the bytes"),
        (behind(b"\1\0\0\0\xff"), 400, "text[0] is not UTF-8: byte 1 is wrong"),
        (behind(b"\1\0\0\0a\1\0\0\0b"), 400, "another number of texts than the 1"),
        (behind(b"\1\0\0\0a", shape=(2,)), 400, "another number of texts than the 2"),
        (behind(shape=(1 << 60,)), 400, "another number of texts"),
        (behind(b"1234567", datatype="INT64"), 400, "text has 7 bytes; 1 of INT64 are 8"),
    ],
)
def test_bytes_that_are_not_what_they_say_are_refused(protocols, sent, status, said):
    body, headers = sent
    assert said in message(protocols.http.post("/v2/models/text/infer", content=body, headers=headers), status)


def test_bytes_by_hand(protocols):
    body, headers = behind(b"\2\0\0\0no\0\0\0\0", shape=(2, 1))
    response = protocols.http.post("/v2/models/text/infer", content=body, headers=headers)
    label, blank = response.json()["outputs"][0]["data"]
    assert (label in ("open", "closed"), blank) == (True, "")


def test_the_document_describes_the_routes(protocols):
    paths = protocols.http.get("/openapi.json").json()["paths"]
    for path in [path for path in paths if path.startswith("/v2/models/")]:
        for operation in paths[path].values():
            assert [one["name"] for one in operation["parameters"]] == re.findall(r"{(\w+)}", path)
    schema = paths["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["inputs"]["items"]["required"] == ["name", "shape", "datatype"]
    assert "$ref" not in json.dumps(schema)
