import pytest

from bertforge.data.schema import QUESTIONS
from bertforge.inference.codec import Codec
from bertforge.manifest import served
from bertforge.serving.inputs import Columns, read_inputs
from bertforge.serving.requests import RequestError
from bertforge.serving.settings import Limits
from tests.runs import made_up

LIMITS = Limits(max_texts=3, max_characters=5000)
ROW = made_up(1)[list(QUESTIONS.required_columns)].to_dict("records")[0]


@pytest.fixture(scope="module")
def text(runs):
    return Columns.of(Codec.load(*served(runs["full"])))


@pytest.fixture(scope="module")
def columns(runs):
    return Columns.of(Codec.load(*served(runs["columns"])))


def test_columns_are_those_of_the_table_that_the_model_reads(text, columns):
    assert (text.texts, text.needed, text.beside) == (("Title", "BodyMarkdown"), (), False)
    assert columns.beside
    assert set(columns.needed) == {
        "OwnerCreationDate", "PostCreationDate", "ReputationAtPostCreation", "OwnerUndeletedAnswerCountAtPostTime",
        "Tag1", "Tag2", "Tag3", "Tag4", "Tag5",
    }  # fmt: skip


def test_one_input_and_a_list_of_one_are_the_same(text):
    assert read_inputs("a", text, LIMITS) == read_inputs(["a"], text, LIMITS) == ["a"]
    assert read_inputs("x" * 5000, text, LIMITS) == ["x" * 5000]
    assert len(read_inputs(["a"] * 3, text, LIMITS)) == 3


def test_cells_become_what_a_table_holds(columns):
    (row,) = read_inputs({**ROW, "ReputationAtPostCreation": 14, "Tag1": None, "Tag2": True}, columns, LIMITS)
    assert set(row) == {*columns.texts, *columns.needed}
    assert (row["ReputationAtPostCreation"], row["Tag1"], row["Tag2"]) == ("14", "", "true")


def test_a_whole_row_of_the_table_may_be_sent(text):
    assert read_inputs(ROW, text, LIMITS) == [{name: ROW[name] for name in ("Title", "BodyMarkdown")}]


@pytest.mark.parametrize(
    ("given", "status", "field", "said"),
    [
        (None, 422, "inputs", "is missing"),
        ([], 422, "inputs", "is empty"),
        (3, 422, "inputs", "is a number"),
        (["a"] * 4, 413, "inputs", "has 4 entries; the limit is 3"),
        (["a", None], 422, "inputs[1]", "is null"),
        (["a", ["b"]], 422, "inputs[1]", "is a list"),
        (["a", ROW], 422, "inputs[1]", "is an object, but inputs[0] is a text"),
        (["a", "x" * 5001], 413, "inputs[1]", "has 5,001 characters; the limit is 5,000"),
        (["a", "half \ud800"], 422, "inputs[1]", "half a character at 6"),
        ({}, 422, "inputs.Title", "lacks Title"),
        ({"Tag": "b", "title": "a"}, 422, "inputs.Title", "lacks Title; title was sent, which is no column"),
        ({"text": "a"}, 422, "inputs.Title", "lacks Title; text was sent"),
        ({"Title": "a"}, 422, "inputs.BodyMarkdown", "lacks BodyMarkdown; send null"),
        ([{**ROW, "PostId": 3}], 422, "inputs[0].PostId", "it reads Title, BodyMarkdown"),
        ([{**ROW, "Titel": "a"}], 422, "inputs[0].Titel", "table has no column inputs[0].Titel"),
        ([{**ROW, "Title": 3}], 422, "inputs[0].Title", "is a number; send a text"),
        ([{**ROW, "Tag1": ["a"]}], 422, "inputs[0].Tag1", "is a list"),
        ([{**ROW, "Tag1": "\ud800"}], 422, "inputs[0].Tag1", "half a character"),
        ([{**ROW, "ReputationAtPostCreation": float("inf")}], 422, "inputs[0].ReputationAtPostCreation", "too large"),
    ],
)
def test_what_is_wrong_is_named(text, given, status, field, said):
    with pytest.raises(RequestError) as raised:
        read_inputs(given, text, LIMITS)
    assert (raised.value.status, raised.value.field) == (status, field)
    assert said in str(raised.value)


def test_a_text_is_too_little_for_a_model_that_reads_columns(columns):
    with pytest.raises(RequestError, match="is a text, but the model reads Title, BodyMarkdown, OwnerCreationDate"):
        read_inputs(["a"], columns, LIMITS)
    with pytest.raises(RequestError) as raised:
        read_inputs({name: cell for name, cell in ROW.items() if name != "Tag3"}, columns, LIMITS)
    assert raised.value.field == "inputs.Tag3"
