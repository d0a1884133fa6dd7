"""serving/leave_one_out.py on models whose answer is known: sums of weights of words and columns."""

import asyncio

import numpy as np
import pytest

from bertforge.serving.leave_one_out import MOST_PASSES, leave_one_out

WEIGHTS = {"please": 2.0, "thanks": -1.0, "猫": 1.5}
BODY = ("Title", "Body")


class Linear:
    """p(closed) of a question: the logistic function of its words' weights and of its column `points`."""

    def __init__(self, weights=WEIGHTS):
        self.weights, self.lots = weights, []

    def chance(self, question):
        row = {"Body": question} if isinstance(question, str) else question
        text = " ".join(row.get(name) or "" for name in BODY)
        found = sum(weight for word, weight in self.weights.items() for _ in range(text.count(word)))
        return 1 / (1 + np.exp(-found - float(row.get("points") or 0)))

    async def __call__(self, rows):
        self.lots.append(len(rows))
        return [self.chance(row) for row in rows]


def explained(row, model=None, columns=("points",), is_full=lambda text: False):
    model = model or Linear()
    return asyncio.run(leave_one_out(row, model.chance(row), BODY, columns, is_full, model))


def texts(question, found):
    """Text -> push, cut out of the field that it is said to stand in."""
    return {
        (question if part.field is None else question[part.field])[part.start : part.end]: part.push
        for part in found.passages
    }


@pytest.mark.parametrize("word", ["please", "thanks"])
def test_the_word_that_decides_is_the_one_that_pushes(word):
    text = f"how do I {word} sort 𝒳 lists"  # a letter outside the first plane is one character
    model = Linear({word: 3.0})
    pushes = texts(text, explained(text, model))
    assert list(pushes) == text.split()
    assert pushes.pop(word) == pytest.approx(model.chance(text) - 0.5, abs=1e-6)
    assert set(pushes.values()) == {0.0}


def test_a_word_pushes_against_the_label_too():
    pushes = texts("please, thanks for all", explained("please, thanks for all"))
    assert pushes["please,"] > 0.2
    assert pushes["thanks"] < -0.1


def test_of_a_text_of_many_words_only_the_first_are_looked_at():
    asked = []

    def is_full(before):
        asked.append(len(before))
        return False

    found = explained("猫" * 100_000, is_full=is_full)
    assert max(asked) < 512
    assert found.passages[-1].end == 512


def test_a_push_stands_in_the_field_of_its_word():
    row = {"Title": "please sort", "Body": "sort please please", "points": "0"}
    found = explained(row)
    assert [(part.field, part.start) for part in found.passages if part.push] == [
        ("Title", 0),
        ("Body", 5),
        ("Body", 12),
    ]


def test_a_column_pushes_what_the_answer_loses_without_it():
    row = {"Title": "sort", "Body": "a list", "points": "2", "empty": ""}
    model = Linear()
    found = explained(row, model, columns=("points", "empty", "unknown"))
    assert found.columns == {"points": pytest.approx(model.chance(row) - 0.5, abs=1e-6)}


def test_ideographs_are_words_by_themselves_and_nothing_is_joined_where_one_goes():
    model = Linear({"猫": 1.0, "ab": -5.0})
    pushes = texts("我的a猫b很大", explained("我的a猫b很大", model))
    assert list(pushes) == ["我", "的", "a", "猫", "b", "很", "大"]
    assert pushes["猫"] > 0.2


@pytest.mark.parametrize("count", [MOST_PASSES, MOST_PASSES + 1, 500, 512])
def test_a_long_text_costs_no_more_passes_and_its_strongest_word_is_found(count):
    words = [f"w{place}" for place in range(count)]
    words[count // 3] = "please"
    text, model = " ".join(words), Linear()
    found = explained(text, model)
    assert sum(model.lots) <= MOST_PASSES
    assert max(model.lots) <= 16
    strongest = max(found.passages, key=lambda part: part.push)
    assert "please" in text[strongest.start : strongest.end]
    assert sum(part.words for part in found.passages) == count
    places = [(part.start, part.end) for part in found.passages]
    assert places == sorted(places)
    if count <= 500:
        assert text[strongest.start : strongest.end] == "please"
    assert bool(found.note) == (count > MOST_PASSES)


def test_what_the_model_does_not_read_is_not_asked():
    row = {"Title": "one two", "Body": "three four five please"}
    found = explained(row, is_full=lambda text: len(text.split()) >= 4)
    assert [(row[part.field][part.start : part.end]) for part in found.passages] == ["one", "two", "three", "four"]


def test_one_word_alone_has_no_push():
    assert explained("please").passages == []


def test_equal_questions_get_equal_pushes():
    text = " ".join(["please", "thanks", *("word" for _ in range(300))])
    assert explained(text) == explained(text)
