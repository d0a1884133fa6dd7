"""What a table gives away without a language model: the bar that a fine-tuned model has to clear.

Three classifiers, fitted on the train rows in seconds:

- the most frequent label of the train rows, always;
- TF-IDF of words and pairs of words, with logistic regression (scikit-learn). Punctuation counts as words: it raised
  accuracy on all three tables tried (on Stack Overflow from 76.2 to 77.0%). SAG (Schmidt et al. 2017) fits 77 labels
  in a second where L-BFGS takes ten. The penalty is chosen on validation rows, as the model's best epoch is;
- where the model reads columns, gradient boosting on them (`boosting`).

They depend on the data, the split and the columns, and not on the model. So what they say of the validation and test
rows is kept in the folder of the data, as tokens are, and the second run on it fits nothing. The test rows' labels are
not looked at here: `standing` counts what is right, and `evaluate --split test` alone asks it to for test rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bertforge.artifact import write_atomic
from bertforge.data.prepared import PreparedData
from bertforge.errors import ArtifactError
from bertforge.evaluation.boosting import boosted_trees, encode_columns

if TYPE_CHECKING:
    from bertforge.columns.transform import TabularSpec

MAJORITY = "the most frequent label"
TEXT = "TF-IDF + logistic regression"
COLUMNS = "gradient boosting on the columns"
INSTALL = "pip install 'bertforge[baselines]'"

MOST_ROWS = 50_000  # of each part, drawn at random: a floor is known well enough from these, in half a minute
MOST_CHARACTERS = 3_000  # of a text: about the 512 tokens that a model reads
MOST_TERMS = 200_000
PENALTIES = (1.0, 5.0, 30.0)  # C: the inverse of the penalty's weight
_FORMAT = 1  # raise it when a baseline is fitted otherwise: what was kept is then fitted again


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline's answers."""

    name: str
    rows: np.ndarray
    """[answers] int64, ascending: validation and test rows of the prepared data."""
    probabilities: np.ndarray
    """[answers, labels] float32."""
    train_rows: int
    """Rows it was fitted on."""
    seconds: float
    """That fitting and answering took."""

    def save(self, path: Path) -> None:
        """Writes one .npz file, atomically."""
        content = io.BytesIO()
        np.savez(
            content,
            name=np.array(self.name),
            rows=self.rows,
            probabilities=self.probabilities,
            train_rows=np.array(self.train_rows),
            seconds=np.array(self.seconds),
        )
        write_atomic(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote; raises ArtifactError when the file is damaged."""
        try:
            with np.load(path, allow_pickle=False) as kept:
                name, train_rows, seconds = (kept[key].item() for key in ("name", "train_rows", "seconds"))
                return cls(name, kept["rows"], kept["probabilities"], train_rows, seconds)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path} is damaged ({error}); remove it, and it is made again: rm {path}") from error


@dataclass(frozen=True)
class _Rows:
    """Row numbers, about MOST_ROWS of each part at most."""

    train: np.ndarray
    """Of every label, one row at least."""
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, data: PreparedData, split: str, labels: np.ndarray) -> Self:
        train, validation, test = (data.rows(split, part) for part in ("train", "validation", "test"))
        _, one_of_each = np.unique(labels[train], return_index=True)
        drawn = np.union1d(_at_most(train, MOST_ROWS), train[one_of_each])
        return cls(drawn, _at_most(validation, MOST_ROWS), _at_most(test, MOST_ROWS))

    @property
    def asked(self) -> np.ndarray:
        return np.sort(np.concatenate([self.validation, self.test]))


def installed() -> bool:
    """Whether scikit-learn is there; without it, the most frequent label is the only baseline."""
    return bool(util.find_spec("sklearn"))


def baselines(data: PreparedData, split: str, columns: TabularSpec | None) -> list[Baseline]:
    """The baselines of a split of `data`, `columns` being those that the model reads; fitted where none were kept.

    Every label must have a train row, as training asks for.
    """
    labels = np.asarray(data.labels)
    rows = _Rows.of(data, split, labels)
    known = labels[rows.train]
    found = [_timed(MAJORITY, rows, partial(_majority, known, len(rows.asked), len(data.label_names)))]
    fitted: list[tuple[str, Callable[[], np.ndarray], Any]] = [(TEXT, partial(_text, data, labels, rows), None)]
    if columns:
        given = columns.to_dict()
        read = {name: given[name] for name in columns.kinds}
        fitted.append((COLUMNS, partial(_columns, data, labels, rows, columns), read))
    for name, fit, settings in fitted:
        key = hashlib.sha256(json.dumps([_FORMAT, name, split, settings]).encode()).hexdigest()[:12]
        path = data.directory / "baselines" / f"{key}.npz"
        if path.is_file():
            found.append(Baseline.load(path))
        elif installed():
            found.append(_timed(name, rows, fit))
            with contextlib.suppress(OSError):  # a folder that may only be read: it is fitted again the next time
                found[-1].save(path)
    return found


@contextmanager
def fitted_beside(data: PreparedData, split: str, columns: TabularSpec | None) -> Iterator[None]:
    """Fits `baselines` in a process of its own while the block runs, and is done with them when the block ends.

    For work on a GPU, which leaves the CPU's cores alone; in a thread, the two would wait for the interpreter's lock.
    What goes wrong there is left to whoever asks for `baselines` next. Where the block fails, the process is ended.
    """
    task = json.dumps([str(data.directory), split, columns and columns.to_dict()])
    null = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-m", __name__, task], stdin=null, stdout=null, stderr=null) as fitting:
        try:
            yield
        except BaseException:
            fitting.kill()
            raise


def _at_most(rows: np.ndarray, count: int) -> np.ndarray:
    """`rows`, or `count` of them drawn at random, the same ones each time; ascending."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, count, replace=False))


def _timed(name: str, rows: _Rows, fit: Callable[[], np.ndarray]) -> Baseline:
    began = time.perf_counter()
    probabilities = fit().astype(np.float32)
    return Baseline(name, rows.asked, probabilities, len(rows.train), time.perf_counter() - began)


def _majority(known: np.ndarray, asked: int, classes: int) -> np.ndarray:
    """[asked, classes] the shares of the train labels."""
    return np.tile(np.bincount(known, minlength=classes) / len(known), (asked, 1))


def _text(data: PreparedData, labels: np.ndarray, rows: _Rows) -> np.ndarray:
    """[asked, classes] of the logistic regression with the lowest validation loss."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(
        token_pattern=r"\w+|[^\w\s]",  # so no text is without words, whatever its script
        ngram_range=(1, 2),
        sublinear_tf=True,
        max_features=MOST_TERMS,
        dtype=np.float32,
    )
    known, asked = (
        method([text[:MOST_CHARACTERS] for text in data.texts(part)])  # sparse [rows, terms]
        for method, part in ((vectorizer.fit_transform, rows.train), (vectorizer.transform, rows.asked))
    )
    held_out = np.isin(rows.asked, rows.validation)
    true = labels[rows.asked[held_out]]
    best, least = np.empty(0), np.inf
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, solver="sag", tol=1e-2, max_iter=100, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a hundred passes are near enough for a floor
            model.fit(known, labels[rows.train])
        answers = model.predict_proba(asked)
        loss = -np.log(answers[held_out, true].clip(1e-9)).mean()
        if loss < least:
            best, least = answers, loss
    return best


def _columns(data: PreparedData, labels: np.ndarray, rows: _Rows, columns: TabularSpec) -> np.ndarray:
    """[asked, classes] of gradient boosting."""
    frame = data.columns(columns.columns)
    encoded, categories = encode_columns(frame, columns, labels, rows.train, rows.asked)
    trees = boosted_trees(len(data.label_names), categories, seed=0).fit(encoded.loc[rows.train], labels[rows.train])
    return np.asarray(trees.predict_proba(encoded.loc[rows.asked]))


if __name__ == "__main__":  # see `fitted_beside`
    from bertforge.columns.transform import TabularSpec

    directory, split, settings = json.loads(sys.argv[1])
    baselines(PreparedData.open(Path(directory)), split, TabularSpec.of(**settings) if settings else None)
