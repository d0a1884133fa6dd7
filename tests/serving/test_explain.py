"""POST /v1/explain of a running service: its pushes are those of /v1/classify, asked by hand."""

import pytest

ROW = {
    "Title": "Which laptop is the best?",
    "BodyMarkdown": "I want to buy one.\nThanks!",
    "Tag1": "hardware",
    "ReputationAtPostCreation": 3,
    **dict.fromkeys(("Tag2", "Tag3", "Tag4", "Tag5", "OwnerCreationDate", "PostCreationDate")),
    "OwnerUndeletedAnswerCountAtPostTime": None,
}


def chances(server, *rows):
    return [row["probabilities"] for row in server.classify(list(rows)).json()["results"]]


def explain(server, inputs, **fields):
    return server.http.post("/v1/explain", json={"inputs": inputs, **fields}).json()


def test_a_push_is_what_the_probability_loses_without_the_word_or_column(server):
    found = explain(server, ROW)
    (whole,) = chances(server, ROW)
    assert found["probability"] == pytest.approx(whole[found["label"]], abs=1e-5) == max(whole.values())
    assert [word["text"] for word in found["words"]] == f"{ROW['Title']} {ROW['BodyMarkdown']}".split()
    assert {column["name"]: column["value"] for column in found["columns"]} == {
        "Tag1": "hardware",
        "ReputationAtPostCreation": "3",
    }
    without = [
        {**ROW, word["field"]: ROW[word["field"]][: word["start"]] + " " + ROW[word["field"]][word["end"] :]}
        for word in found["words"]
    ] + [{**ROW, column["name"]: None} for column in found["columns"]]
    pushes = [part["push"] for part in (*found["words"], *found["columns"])]
    expected = [whole[found["label"]] - chance[found["label"]] for chance in chances(server, *without)]
    # Beside other rows a logit differs by some 1e-6, and the temperature makes seven times that of it.
    assert pushes == pytest.approx(expected, abs=2e-5)
    assert max(map(abs, pushes)) > 1e-3
    assert explain(server, ROW)["words"] == found["words"]


def test_a_text_alone_has_no_fields_and_is_explained_as_far_as_it_is_read(server):
    text = "How do I 𝒳 sort a list? " * 20
    found = explain(server, text, model="plain")
    answer = server.classify(text, model="plain").json()["results"][0]
    assert answer["tokens_cut"] > 0
    assert all(word["field"] is None and word["text"] == text[word["start"] : word["end"]] for word in found["words"])
    assert answer["tokens"] - 2 >= len(found["words"]) > 30
    assert found["mistakes"] == []  # nobody evaluated this model


def test_similar_mistakes_were_given_the_same_label(server):
    found = explain(server, ROW)
    assert 0 < len(found["mistakes"]) <= 3
    for mistake in found["mistakes"]:
        assert mistake["predicted"] == found["label"] != mistake["true"]


def test_an_explanation_leaves_no_trace_in_the_monitor(server):
    def rows():
        return server.http.get("/v1/monitor").json()["rows"]

    before = rows()
    explain(server, ROW)
    assert rows() == before
    server.classify(ROW)
    assert rows() == before + 1


def test_a_blank_text_has_no_label_and_one_word_has_no_push(server):
    blank = explain(server, " \n", model="plain")
    assert (blank["label"], blank["probability"], blank["words"]) == (None, None, [])
    assert explain(server, "laptop", model="plain")["words"] == []


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"inputs": ["one", "two"], "model": "plain"}, 422, "inputs"),
        ({"inputs": 3, "model": "plain"}, 422, "inputs"),
        ({"model": "plain"}, 422, "inputs"),
        ({"inputs": "one", "model": "nobody"}, 404, "model"),
        ({"inputs": "one", "model": "plain", "timeout_ms": 0}, 422, "timeout_ms"),
        ({"inputs": "one two", "model": "plain", "timeout_ms": 1}, 504, None),
    ],
)
def test_what_cannot_be_explained_is_refused_and_named(server, body, status, field):
    refused = server.http.post("/v1/explain", json=body)
    assert refused.status_code == status
    assert refused.json()["error"]["field"] == field
