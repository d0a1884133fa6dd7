"""`/predict` and `/info`, asked as text-embeddings-inference's clients ask, Hugging Face's among them."""

import numpy as np
import pytest

from bertforge.inference.predictor import Predictor
from bertforge.serving.tei import Info, Prediction, Refused

CLOSE = 2e-6  # float32, summed beside other rows
LONG = "word " * 100  # the model reads 48 tokens


def predict(protocols, inputs, path="/predict", **fields):
    return protocols.http.post(path, json={"inputs": inputs, **fields})


def refused(response, status, kind="Validation"):
    """The message of an error in the form of text-embeddings-inference."""
    assert response.status_code == status, response.text
    told = Refused.model_validate_json(response.text)
    assert told.error_type == kind
    return told.error


def scores(predictions):
    """By label, of predictions that are sorted."""
    found = [Prediction.model_validate(one) for one in predictions]
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    return {one.label: one.score for one in found}


def test_one_text_is_a_list_and_a_batch_a_list_of_lists(protocols, runs):
    texts = ["How do I sort a list?", "Which laptop should I buy?", LONG]
    expected = Predictor.load(runs["full"], "fp32").predict_proba(texts)
    for inputs in (texts[0], [texts[0]]):
        one = scores(predict(protocols, inputs).json())
        assert [one["open"], one["closed"]] == pytest.approx(expected.iloc[0].tolist(), abs=CLOSE)
    several = [scores(one) for one in predict(protocols, [[text] for text in texts]).json()]
    np.testing.assert_allclose([[one["open"], one["closed"]] for one in several], expected, atol=CLOSE)
    assert [len(predict(protocols, [[texts[0]]]).json())] == [1]
    assert predict(protocols, texts[0], path="/").json() == predict(protocols, texts[0]).json()


def test_raw_scores_are_logits(protocols, runs):
    raw = scores(predict(protocols, "a", raw_scores=True).json())
    logits = Predictor.load(runs["full"], "fp32").logits(["a"])[0]
    assert [raw["open"], raw["closed"]] == pytest.approx(logits.tolist(), abs=CLOSE)


def test_a_text_is_cut_unless_the_client_forbids_it(protocols):
    assert "has 102 tokens; the model reads 48" in refused(predict(protocols, [["a"], [LONG]], truncate=False), 422)
    assert "must be right" in refused(predict(protocols, LONG, truncation_direction="Left"), 422)
    for fields in ({"truncate": None}, {"truncate": True}, {"truncation_direction": "right"}):
        assert predict(protocols, LONG, **fields).status_code == 200
    assert predict(protocols, "a", truncate=False, truncation_direction="left").status_code == 200


def test_hugging_faces_client_is_answered(protocols, monkeypatch):
    import huggingface_hub as hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it asks nobody but the address it is given
    client = hub.InferenceClient(
        protocols.address,
        api_key=protocols.http.headers["authorization"].removeprefix("Bearer "),
        provider="hf-inference",
    )
    found = client.text_classification("How do I sort a list?")
    expected = predict(protocols, "How do I sort a list?").json()
    assert [(one.label, one.score) for one in found] == [(one["label"], one["score"]) for one in expected]
    (best,) = client.text_classification("How do I sort a list?", top_k=1)
    assert best.label == expected[0]["label"]
    raw = client.text_classification("a", function_to_apply="none")
    assert {one.label: one.score for one in raw} == scores(predict(protocols, "a", raw_scores=True).json())
    with pytest.raises(hub.errors.HfHubHTTPError, match="422"):
        client.text_classification("a", function_to_apply="sigmoid")
    info = Info.model_validate(client.get_endpoint_info())
    assert (info.model_id, info.max_input_length, info.max_client_batch_size) == ("text", 48, 64)
    assert info.model_type.classifier.id2label == {"0": "open", "1": "closed"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "inputs is missing"),
        ({"inputs": None}, "inputs is missing"),
        ({"inputs": 7}, "inputs is a number"),
        ({"inputs": {"text": "a"}}, "inputs is an object"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": ["a", "b"]}, "pairs are not read"),
        ({"inputs": ["a", 7]}, "inputs is not one text"),
        ({"inputs": [["a"], "b"]}, "inputs[1] is a text; send a list of one text"),
        ({"inputs": [["a"], []]}, "inputs[1] is not one text"),
        ({"inputs": [["a", "b"]]}, "inputs[0] is not one text"),
        ({"inputs": [[7]]}, "inputs[0] is not one text"),
        ({"inputs": [["a"]] * 65}, "inputs has 65 entries; the limit is 64"),
        ({"inputs": "a " * 501}, "the limit is 1,000"),
        ({"inputs": "a", "raw_scores": 1}, "raw_scores is a number"),
        ({"inputs": "a", "truncate": "no"}, "truncate is a text"),
        ({"inputs": "a", "truncation_direction": "up"}, "truncation_direction is not right or left"),
        ({"inputs": "a", "truncation_direction": []}, "truncation_direction is not right or left"),
        ({"inputs": "a", "parameters": []}, "parameters is a list"),
        ({"inputs": "a", "parameters": {"k": 1}}, "unknown field k;"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "top_k is no whole number"),
        ({"inputs": "a", "normalize": True}, "unknown field normalize;"),
    ],
)
@pytest.mark.parametrize("path", ["/predict", "/"])
def test_what_is_wrong_is_a_validation_error(protocols, path, fields, said):
    assert said in refused(protocols.http.post(path, json=fields), 422)


def test_other_refusals_have_the_same_form(protocols):
    for text in ("", " \n"):
        assert "inputs[0] holds no text" in refused(predict(protocols, text), 400, "Empty")
    kind = {"content-type": "application/json"}
    refused(protocols.http.post("/predict", content=b"{", headers=kind), 400)
    refused(protocols.http.post("/predict", content=b"{}".ljust(1 << 17), headers=kind), 413)
    refused(protocols.http.post("/predict", data={"inputs": "a"}), 415)
    for path in ("/predict", "/"):
        refused(protocols.http.post(path, json={"inputs": "a"}, headers={"authorization": "Bearer nobody"}), 401)


def test_a_model_that_reads_columns_is_refused(server):
    said = refused(predict(server, "a"), 424, "Backend")
    assert "sure reads Title, BodyMarkdown" in said
    assert "ask it at /v1/classify" in said
    refused(server.http.get("/info"), 424, "Backend")
