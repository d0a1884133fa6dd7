"""Columns derived from a Stack Overflow question: what `prepare` stores, `train` may use and `predict` computes again.

To add one, write a function under `@feature(<the source columns it reads>)`; its name is the column's name and its
docstring states the unit. It gets the chunk's `Rows` and returns one value per row: float64 with NaN, or a string
array with null, where the value is missing. Nothing is filled in here: the encoder that is fitted on the train rows
decides what stands for a missing value. Work on whole columns (pyarrow.compute, numpy): 3.4 million rows pass here.

The first five are the study's.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertforge.data.rows import Floats, Rows
from bertforge.data.schema import OWNER_DATE, QUESTIONS, STACK_OVERFLOW, TAGS, Schema
from bertforge.errors import DataError

SITE_START = np.datetime64("2008-07-31", "s")  # the first question of Stack Overflow
_POSTED = "PostCreationDate"
_TITLE, _BODY = "Title", "BodyMarkdown"
_DAY = np.timedelta64(1, "D")


@dataclass(frozen=True)
class Feature:
    """A derived column: how it is computed and which source columns that takes."""

    compute: Callable[[Rows], Floats | pa.Array]
    sources: tuple[str, ...]


FEATURES: dict[str, Feature] = {}


def feature(*sources: str) -> Callable[[Callable[[Rows], Floats | pa.Array]], Callable[[Rows], Floats | pa.Array]]:
    """Registers a function as the derived column of its name, computed where all `sources` are in the table."""

    def register(compute: Callable[[Rows], Floats | pa.Array]) -> Callable[[Rows], Floats | pa.Array]:
        FEATURES[compute.__name__] = Feature(compute, sources)
        return compute

    return register


def named_as_derived(columns: Iterable[str], schema: Schema) -> list[str]:
    """Columns of a table that have the name of a derived one: `prepare` refuses them, `predict` leaves them out."""
    return [name for name in columns if name in FEATURES] if schema.kind == STACK_OVERFLOW else []


def require_readable(read: Iterable[str], given: list[str]) -> None:
    """Raises DataError where a table with the columns `given` lacks one that a model reads.

    It names the source columns of a derived one.
    """
    for name in read:
        if name in given:
            continue
        if name in FEATURES and set(QUESTIONS.text_columns) <= set(given):
            missing = [source for source in FEATURES[name].sources if source not in given]
            found = ", ".join(column for column in given if column not in FEATURES)
            raise DataError(
                f"the model reads {name!r}, made from {', '.join(missing)}, which the table lacks; it has {found}"
            )
        raise DataError(f"the model reads column {name!r}, but the table has {', '.join(given)}")


def derive(rows: Rows, schema: Schema, wanted: Container[str] | None = None) -> pa.Table:
    """The `wanted` derived columns (None: all) whose sources are in the table: float64 and strings, null where missing.

    A table of another kind than Stack Overflow's has none.
    """
    if schema.kind != STACK_OVERFLOW:
        return pa.table({})
    present = set(rows.names)
    columns: dict[str, pa.Array] = {}
    for name, derived in FEATURES.items():
        if present.issuperset(derived.sources) and (wanted is None or name in wanted):
            values = derived.compute(rows)
            columns[name] = (
                pa.array(values, pa.float64(), from_pandas=True) if isinstance(values, np.ndarray) else values
            )
    return pa.table(columns)


@feature(OWNER_DATE, _POSTED)
def account_age_days(rows: Rows) -> Floats:
    """Days from the making of the account to the posting; slightly negative where accounts were joined later."""
    return _days(rows.date(_POSTED) - rows.date(OWNER_DATE))


@feature(*TAGS)
def tag_count(rows: Rows) -> Floats:
    """Tags given, 0 to 5."""
    count: Floats = np.sum([rows.present(tag) for tag in TAGS], axis=0, dtype=np.float64)
    return count


@feature("ReputationAtPostCreation")
def reputation(rows: Rows) -> Floats:
    """The owner's reputation at posting, points; from -34 to 209,631 in the real table."""
    return rows.number("ReputationAtPostCreation")


@feature(_TITLE)
def title_words(rows: Rows) -> Floats:
    """Words in the title."""
    return _word_count(rows.text(_TITLE))


@feature(_BODY)
def body_words(rows: Rows) -> Floats:
    """Words in the body."""
    return _word_count(rows.text(_BODY))


@feature("OwnerUndeletedAnswerCountAtPostTime")
def answers_before(rows: Rows) -> Floats:
    """Answers the owner had given before."""
    return rows.number("OwnerUndeletedAnswerCountAtPostTime")


@feature(_POSTED)
def days_since_start(rows: Rows) -> Floats:
    """Days from the start of the site (2008-07-31) to the posting: moderation grew stricter with the years."""
    return _days(rows.date(_POSTED) - SITE_START)


@feature(_POSTED)
def hour(rows: Rows) -> Floats:
    """Hour of the day of the posting, 0 to 23, UTC."""
    posted = rows.date(_POSTED)
    return _number(posted.astype("datetime64[h]").astype(np.int64) % 24, posted)


@feature(_POSTED)
def weekday(rows: Rows) -> Floats:
    """Day of the week of the posting, 0 is Monday."""
    posted = rows.date(_POSTED)
    return _number((posted.astype("datetime64[D]").astype(np.int64) + 3) % 7, posted)  # 1970-01-01 was a Thursday


@feature("Tag1")
def first_tag(rows: Rows) -> pa.Array:
    """The first tag."""
    return _null_if_empty(rows.text("Tag1"))


@feature(*TAGS)
def tags(rows: Rows) -> pa.Array:
    """All tags, joined by one space."""
    joined = pc.binary_join_element_wise(*[rows.text(tag) for tag in TAGS], pa.scalar(" ", pa.large_string()))
    return _null_if_empty(pc.utf8_trim_whitespace(pc.replace_substring_regex(joined, " +", " ")))


@feature(_BODY)
def code_lines(rows: Rows) -> Floats:
    """Lines of the body that Markdown shows as code: indented by four spaces or a tab."""
    return _count(rows.raw(_BODY), r"(?m)^(?:    |\t)")


@feature(_TITLE, _BODY)
def question_marks(rows: Rows) -> Floats:
    """Question marks in title and body."""
    title, body = (pc.count_substring(rows.raw(column), "?") for column in (_TITLE, _BODY))
    return _float(pc.add(title, body))


@feature(_BODY)
def links(rows: Rows) -> Floats:
    """Addresses (http or https) in the body."""
    return _count(rows.raw(_BODY), r"https?://")


@feature(_TITLE)
def title_capitalised(rows: Rows) -> Floats:
    """1 where the title starts with a capital letter, else 0."""
    return _float(pc.match_substring_regex(rows.text(_TITLE), r"^\p{Lu}"))


@feature(_TITLE)
def title_characters(rows: Rows) -> Floats:
    """Characters in the title."""
    return _float(pc.utf8_length(rows.text(_TITLE)))


@feature(_TITLE)
def title_question_marks(rows: Rows) -> Floats:
    """Question marks in the title."""
    return _float(pc.count_substring(rows.raw(_TITLE), "?"))


@feature(_BODY)
def code_characters(rows: Rows) -> Floats:
    """Characters of the body in code lines, line ends included."""
    return _float(pc.utf8_length(rows.raw(_BODY))) - _float(pc.utf8_length(_prose(rows)))


@feature(_BODY)
def code_share(rows: Rows) -> Floats:
    """Share of the body's characters that stand in code lines."""
    return code_characters(rows) / np.maximum(_float(pc.utf8_length(rows.raw(_BODY))), 1)


@feature(_BODY)
def prose_words(rows: Rows) -> Floats:
    """Words of the body outside code lines."""
    return _word_count(pc.utf8_trim_whitespace(_prose(rows)))


@feature(_BODY)
def prose_question_marks(rows: Rows) -> Floats:
    """Question marks of the body outside code lines."""
    return _float(pc.count_substring(_prose(rows), "?"))


@feature(_BODY)
def first_person(rows: Rows) -> Floats:
    """How often the body says "I" outside code lines."""
    return _count(_prose(rows), r"\bI\b")


@feature(_BODY)
def paragraph_breaks(rows: Rows) -> Floats:
    """Runs of blank lines in the body."""
    return _count(rows.raw(_BODY), r"\n[ \t\r]*\n\s*")


@feature(_BODY)
def backticks(rows: Rows) -> Floats:
    """Backticks in the body: two for each piece of inline code."""
    return _float(pc.count_substring(rows.raw(_BODY), "`"))


def _prose(rows: Rows) -> pa.Array:
    """The body without its code lines."""
    return rows.once("prose", lambda: pc.replace_substring_regex(rows.raw(_BODY), r"(?m)^(?: {4}|\t).*(?:\n|$)", ""))


def _word_count(text: pa.Array) -> Floats:
    """Words of texts that neither start nor end with white space; ASCII white space separates, as 3x faster."""
    words = _float(pc.list_value_length(pc.ascii_split_whitespace(text)))
    words[pc.equal(text, "").to_numpy(zero_copy_only=False)] = 0
    return words


def _count(text: pa.Array, pattern: str) -> Floats:
    return _float(pc.count_substring_regex(text, pattern))


def _float(values: pa.Array) -> Floats:
    return np.array(values.to_numpy(zero_copy_only=False), dtype=np.float64)


def _days(difference: np.typing.NDArray[np.timedelta64]) -> Floats:
    """NaT becomes NaN."""
    return np.asarray(difference / _DAY, dtype=np.float64)


def _number(values: np.typing.NDArray[np.generic], date: np.typing.NDArray[np.datetime64]) -> Floats:
    return np.where(np.isnat(date), np.nan, values.astype(np.float64))


def _null_if_empty(text: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.large_string()), text)
