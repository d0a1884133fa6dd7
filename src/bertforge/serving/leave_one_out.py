"""Why the model answered so: it is asked again without each word, and without each column.

A word's push is the probability of the label less what that probability is without the word: positive where the word
speaks for the label. This is leave-one-out by the model that serves, temperature and all, so it holds for engines in
8 bits too. Integrated gradients were the other way: they need gradients, which no engine but PyTorch has, and their
pushes belong to pieces of words, on a scale that is no probability.

A text of 500 words would cost 500 passes, so they are bounded. A text of more words than MOST_PASSES is first taken
apart into passages of neighbouring words, and the passes that are left go to the words of the passages that push the
most. The other passages stay whole, and the answer says so. What the model does not read, for the text was cut, is not
asked.

Rows are asked _AT_ONCE at a time, each lot after the answer to the last: they never fill the queue, so a slow
model does not refuse them, and others are served between. Equal rows get equal pushes: ties go by place.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, takewhile

from bertforge.data.tokens import MAX_TOKENS
from bertforge.serving.inputs import Row

MOST_PASSES = 128
"""Of the model for the words of a row, and as many for its columns."""
_PASSAGES = 64  # that a longer text is taken apart into at first
_AT_ONCE = 16
_DIGITS = 6  # of a push; what another batch rounds differently lies behind them
# White space separates words, and an ideograph is a word by itself, as it is to BERT.
_IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_WORD = re.compile(f"[{_IDEOGRAPH}]|[^\\s{_IDEOGRAPH}]+")

Score = Callable[[list[Row]], Awaitable[Sequence[float]]]
"""Rows -> the probability of the label that the whole row has."""


@dataclass(frozen=True)
class Passage:
    """A word, or neighbouring words of one field, and how they push."""

    field: str | None
    """The text column; None where the row is a text alone."""
    start: int
    """Characters (Unicode code points) of the field's text before it."""
    end: int
    words: int = 1
    push: float = 0.0


@dataclass(frozen=True)
class Pushes:
    """What pushed the model to its answer."""

    passages: list[Passage]
    """In the order of the text; none where the text is one word, without which nothing is asked."""
    columns: dict[str, float]
    """Column -> its push: what the label's probability loses when the column is missing."""
    note: str
    """What was left together or left out to stay within MOST_PASSES; "" for nothing."""


async def leave_one_out(
    row: Row,
    probability: float,
    text_columns: Sequence[str],
    columns: Sequence[str],
    is_full: Callable[[str], bool],
    score: Score,
) -> Pushes:
    """The pushes of the words and of the `columns` of a row that has a text and a label of some `probability`.

    `is_full` tells whether the model reads nothing of what follows such a text.
    """

    async def pushes(changed: list[Row]) -> list[float]:
        lots = [changed[start : start + _AT_ONCE] for start in range(0, len(changed), _AT_ONCE)]
        return [round(probability - without, _DIGITS) for lot in lots for without in await score(lot)]

    async def pushed(passages: list[Passage]) -> list[Passage]:
        found = await pushes([_without(row, passage) for passage in passages])
        return [replace(passage, push=push) for passage, push in zip(passages, found, strict=True)]

    words = _read_words(row, text_columns, is_full)
    groups = _groups(words)
    passages = await pushed([replace(group[0], end=group[-1].end, words=len(group)) for group in groups])
    if len(groups) < len(words):
        split = _strongest(passages, MOST_PASSES - len(groups))
        single = iter(await pushed([word for place in split for word in groups[place]]))
        parts = (
            list(islice(single, passage.words)) if place in split else [passage]
            for place, passage in enumerate(passages)
        )
        passages = [passage for part in parts for passage in part]
    cells = {} if isinstance(row, str) else row
    given = [name for name in columns if cells.get(name)]
    asked = given[:MOST_PASSES]
    found = await pushes([{**cells, name: ""} for name in asked])
    return Pushes(passages, dict(zip(asked, found, strict=True)), _note(len(words), passages, len(given) - len(asked)))


def _read_words(row: Row, text_columns: Sequence[str], is_full: Callable[[str], bool]) -> list[Passage]:
    """The words that the model reads, the last perhaps in part; none where there is one alone."""
    fields: dict[str | None, str] = {None: row} if isinstance(row, str) else {name: row[name] for name in text_columns}
    found = (Passage(name, word.start(), word.end()) for name, text in fields.items() for word in _WORD.finditer(text))
    words = [*islice(found, MAX_TOKENS)]  # no model reads more, and a text may be of many

    def is_unread(word: Passage) -> bool:
        before = [fields[name] for name in takewhile(lambda name: name != word.field, fields)]
        return is_full(" ".join([*before, fields[word.field][: word.start]]))

    return words[: bisect_left(words, True, key=is_unread)] if len(words) > 1 else []


def _groups(words: list[Passage]) -> list[list[Passage]]:
    """Words that are asked together at first: each alone where there are few, and never of two fields."""
    size = 1 if len(words) <= MOST_PASSES else -(-len(words) // _PASSAGES)
    runs = [list(run) for _, run in groupby(words, key=lambda word: word.field)]
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]


def _strongest(passages: list[Passage], words: int) -> list[int]:
    """Places, ascending, of the passages that push the most and have no more than so many `words` together."""
    places = []
    for place in sorted(range(len(passages)), key=lambda place: (-abs(passages[place].push), place)):
        words -= passages[place].words
        if words < 0:
            break
        places.append(place)
    return sorted(places)


def _without(row: Row, passage: Passage) -> Row:
    """White space stands where the passage stood, so that its neighbours stay two words."""
    if isinstance(row, str):
        return f"{row[: passage.start]} {row[passage.end :]}"
    assert passage.field is not None, "a row's words stand in its columns"
    text = row[passage.field]
    return {**row, passage.field: f"{text[: passage.start]} {text[passage.end :]}"}


def _note(words: int, passages: list[Passage], unasked: int) -> str:
    kept = sum(passage.words > 1 for passage in passages)
    notes = []
    if kept:
        notes.append(
            f"of the {words} words that the model reads, those of the strongest passages were left out one by one, "
            f"and {kept} other passages as a whole"
        )
    if unasked:
        notes.append(f"{unasked} more columns were not tried")
    return "; ".join(notes)
