"""Made-up Stack Overflow questions in the Kaggle schema, so that the demo needs no download.

Nobody wrote these questions: `sample_topics.toml` says what they are about, `sample_grammar.toml` how they are
worded, and a generator seeded by (seed, row number) draws each row alone. So row 7 is the same in a table of 10 rows
and of a million, and a table's bytes depend on (rows, seed) only.

What there is to learn. A question's class is decided by what it asks, in one of three styles (`STYLES`). A plain
question asks one thing, among facts of its own class. Another also names something of the other class and sets it
aside ("I am not asking which editors are best, but how to ..."), in sentences that both classes use. A third lists two
things and then points at one ("Please answer the latter."). Words alone solve the first style and stay at chance in
the other two. all-MiniLM-L6-v2, fine-tuned on 5,000 rows, solves the first two and is at chance in the third.
`LABEL_NOISE` of the statuses contradict the text, which puts the ceiling of any text model at 92%. The author's
columns (reputation, answers, age of the account, hour) and the number of tags are drawn from the noisy status: they
reach about 70% alone and add a little to the text.

Marking: post numbers start at `MADE_UP_FIRST_POST_ID`, far above every real one, and `is_made_up` looks for that.
"""

from __future__ import annotations

import io
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from importlib import resources
from pathlib import Path
from random import Random

import pandas as pd

from bertforge.artifact import output_files, write_atomic
from bertforge.data.schema import TAGS
from bertforge.errors import UsageError

MADE_UP_FIRST_POST_ID = 900_000_001  # real posts of the competition stop below 12 million
LABEL_NOISE = 0.08
# How many questions name what they ask only, set something else aside, or list two things and point at one.
STYLES = {"plain": 0.45, "set_aside": 0.38, "listed": 0.17}

COLUMNS = (
    "PostId",
    "PostCreationDate",
    "OwnerUserId",
    "OwnerCreationDate",
    "ReputationAtPostCreation",
    "OwnerUndeletedAnswerCountAtPostTime",
    "Title",
    "BodyMarkdown",
    *TAGS,
    "PostClosedDate",
    "OpenStatus",
)
# Shares among closed questions, about those of the competition's data.
CLOSED_SHARES = {"not a real question": 0.37, "off topic": 0.31, "not constructive": 0.22, "too localized": 0.10}

_SITE_START = datetime(2008, 8, 1)
_LAST_DAY = datetime(2012, 7, 31)
_OWNER_EVERY = timedelta(seconds=80)  # one author signed up in each such interval: 1.6 million in four years
_REGULAR_EVERY = timedelta(hours=36)  # a multiple of it: one regular author in each, who asks again and again
_SUFFIXES = (".csv", ".parquet")
_DATE = "%m/%d/%Y %H:%M:%S"
_SLOT = re.compile(r"\{(\^?\w+)\}")

Row = tuple[int | str, ...]
"""One question, its fields in the order of `COLUMNS`."""


@dataclass(frozen=True)
class Topic:
    """One subject; every field lists alternatives, and `code` names the grammar's symbol for a snippet."""

    tags: list[str]
    tools: list[str]
    errors: list[str]
    calls: list[str]
    tasks: list[str]
    code: str


@dataclass(frozen=True)
class Grammar:
    """Symbols and their alternatives, each split at its slots: even parts are text, odd parts name a symbol."""

    alternatives: Mapping[str, tuple[tuple[str, ...], ...]]
    once: frozenset[str]

    def expand(self, symbol: str, bound: dict[str, str], rng: Random) -> str:
        """One random wording of `symbol`; symbols in `bound` are fixed, and those of `once` become so."""
        if symbol in bound:
            return bound[symbol]
        choices = self.alternatives[symbol]
        text = self._fill(choices[int(rng.random() * len(choices))], bound, rng)
        if symbol in self.once:
            bound[symbol] = text
        return text

    def fill(self, template: str, bound: dict[str, str], rng: Random) -> str:
        """`template` with its slots expanded."""
        return self._fill(tuple(_SLOT.split(template)), bound, rng)

    def _fill(self, parts: tuple[str, ...], bound: dict[str, str], rng: Random) -> str:
        filled = list(parts)
        for i in range(1, len(parts), 2):
            text = self.expand(parts[i].removeprefix("^"), bound, rng)
            filled[i] = text[:1].upper() + text[1:] if parts[i][0] == "^" else text
        return "".join(filled)


@cache
def _material() -> tuple[Grammar, tuple[Topic, ...]]:
    """The two word files, read once."""
    folder = resources.files("bertforge.data")
    sections = tomllib.loads(folder.joinpath("sample_grammar.toml").read_text(encoding="utf-8"))
    topics = tomllib.loads(folder.joinpath("sample_topics.toml").read_text(encoding="utf-8"))["topic"]
    alternatives = {
        symbol: tuple(tuple(_SLOT.split(wording)) for wording in wordings)
        for section in sections.values()
        for symbol, wordings in section.items()
    }
    return Grammar(alternatives, frozenset(sections["once"])), tuple(Topic(**topic) for topic in topics)


def sample_row(index: int, seed: int) -> Row:
    """The made-up question number `index`, counted from 0."""
    rng = Random(f"{seed}:{index}")
    _, topics = _material()
    elapsed = rng.random() ** 0.4  # share of the site's four years gone by: there are ever more questions
    is_open = rng.random() < 0.70 - 0.26 * elapsed
    status = "open" if is_open else _draw(CLOSED_SHARES, rng)
    asked = status
    if rng.random() < LABEL_NOISE:
        asked = _draw(CLOSED_SHARES, rng) if is_open else "open"
    topic = rng.choice(topics)
    title, body = _text(topic, asked, rng)
    posted = _SITE_START + elapsed * (_LAST_DAY - _SITE_START)
    posted = posted.replace(hour=int(rng.triangular(0, 24, 17 if is_open else 9)))
    owner, joined, reputation, answers = _author(posted, is_open, rng)
    tags = rng.sample(topic.tags, min(5, 1 + int(rng.triangular(0, 5, 2.4 if is_open else 1.4))))
    closed = "" if is_open else (posted + timedelta(hours=min(rng.lognormvariate(2.7, 2.5), 20_000))).strftime(_DATE)
    return (
        MADE_UP_FIRST_POST_ID + index,
        posted.strftime(_DATE),
        owner,
        joined.strftime(_DATE),
        reputation,
        answers,
        title,
        body,
        *(tags + [""] * 5)[:5],
        closed,
        status,
    )


def _draw(shares: Mapping[str, float], rng: Random) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _text(topic: Topic, asked: str, rng: Random) -> tuple[str, str]:
    """Title and body of a question whose text asks what one of status `asked` asks."""
    grammar, _ = _material()
    tool, tool2 = rng.sample(topic.tools, 2)
    bound = {"tool": tool, "tool2": tool2, "error": rng.choice(topic.errors), "call": rng.choice(topic.calls)}
    bound["task"] = grammar.fill(rng.choice(topic.tasks), bound, rng)
    bound["code"] = grammar.expand(topic.code, bound, rng)
    other = "open" if asked != "open" else _draw(CLOSED_SHARES, rng)
    for role, status in (("focus", asked), ("aside", other)):
        bound[role] = grammar.expand(status, bound, rng) + grammar.expand("rider", bound, rng)
    for facts in ("facts", "facts2"):
        bound[facts] = grammar.expand("open_facts" if asked == "open" else "closed_facts", bound, rng)
    order = [("focus", "wanted"), ("aside", "unwanted")]
    rng.shuffle(order)
    for place, (role, pointer) in zip(("first", "second"), order, strict=True):
        bound[place] = bound[role]
        bound[pointer] = grammar.expand(f"said_{place}", bound, rng)
    style = _draw(STYLES, rng)
    return grammar.expand(f"{style}_title", bound, rng), _tidy(grammar.expand(style, bound, rng))


def _tidy(text: str) -> str:
    """Removes the blanks that empty symbols leave around line ends, but not the indentation of code."""
    text = re.sub(r" +\n", "\n", text)
    text = re.sub(r"(?m)^ (?=\S)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _author(posted: datetime, is_open: bool, rng: Random) -> tuple[int, datetime, int, int]:
    """Owner id, sign-up date, reputation and answers given so far, as of `posted`.

    The id is a function of the sign-up date, so one id always has one date.
    """
    days = (posted - _SITE_START).total_seconds() / 86_400
    is_new = rng.random() < (0.08 if is_open else 0.24)  # signed up to ask
    age = timedelta(days=min(days, rng.random() / 24 if is_new else rng.expovariate(1 / 280)))
    step = _REGULAR_EVERY if rng.random() < 0.2 else _OWNER_EVERY
    joined = _SITE_START + (posted - age - _SITE_START) // step * step
    owner = 1 + (joined - _SITE_START) // _OWNER_EVERY
    if is_new:
        return owner, joined, 1, 0
    reputation = min(int(rng.lognormvariate(4.6, 2.1) if is_open else rng.lognormvariate(3.1, 2.3)), 200_000)
    if rng.random() < 0.003:
        reputation = -rng.randint(1, 34)
    answers = int(max(reputation, 0) / 30 * rng.lognormvariate(0, 1))
    return owner, joined, max(reputation, 1) if reputation >= 0 else reputation, min(answers, 5_000)


def sample_rows(rows: int, seed: int) -> Iterator[Row]:
    """The first `rows` made-up questions of `seed`, drawn one by one.

    Raises UsageError at once when `rows` is below 1.
    """
    if rows < 1:
        raise UsageError(f"cannot write {rows} rows; pass --rows 1 or more")
    return (sample_row(index, seed) for index in range(rows))


def is_made_up(table: pd.DataFrame) -> bool:
    """Whether any row of `table` comes from this generator, so that whatever shows the table can say so."""
    if "PostId" not in table:
        return False
    return bool((pd.to_numeric(table["PostId"], errors="coerce") >= MADE_UP_FIRST_POST_ID).any())


def write_sample(path: Path, rows: Iterable[Row]) -> Path:
    """Atomically writes `rows` as CSV or Parquet, by the suffix of `path`; absent values are empty strings.

    Raises UsageError, before the first row is drawn, for any other suffix.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"cannot write {path.name!r}; name a file that ends in {' or '.join(_SUFFIXES)}")
    with output_files(path):
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        if path.suffix == ".csv":
            return write_atomic(path, table.to_csv(index=False, lineterminator="\n"))
        content = io.BytesIO()
        table.to_parquet(content, index=False)
        return write_atomic(path, content.getvalue())
