"""Baselines learn from train rows alone, are kept with the data, and a model is told where it stands beside them."""

import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from tests.runs import prepare_frame

from bertforge.columns.transform import TabularSpec
from bertforge.data.prepare import PrepareOptions
from bertforge.data.prepared import PreparedData
from bertforge.errors import ArtifactError
from bertforge.evaluation import baselines as module
from bertforge.evaluation.baselines import COLUMNS, MAJORITY, TEXT, baselines, fitted_beside
from bertforge.evaluation.standing import Standing, standing

WORDS = {"ham": ["meeting", "lunch", "report"], "spam": ["prize", "winner", "cash"], "news": ["vote", "storm", "goal"]}
SPEC = TabularSpec.of(numeric=("amount",), categorical=("country",), multi="tags")


@pytest.fixture(scope="module")
def mails(tmp_path_factory, base):
    """1,000 short texts, half of them ham. A word tells the label in 8 rows of 10; `country` does so in every row."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(["ham"] * 500 + ["spam"] * 300 + ["news"] * 200)
    told = np.where(generator.random(1000) < 0.7, labels, generator.choice(list(WORDS), 1000))
    frame = pd.DataFrame(
        {
            "text": [f"number {i} the {generator.choice(WORDS[label])}!" for i, label in enumerate(told)],
            "label": labels,
            "amount": generator.normal(size=1000).round(3).astype(str),
            "country": [{"ham": "de", "spam": "fr", "news": ""}[label] for label in labels],
            "tags": [" ".join(generator.choice(["a", "b", "c"], 2)) for _ in labels],
        }
    )
    options = PrepareOptions(text_columns=("text",), label_column="label")
    return prepare_frame(frame, tmp_path_factory.mktemp("baselines") / "mails", base, options)


@pytest.fixture
def copied(mails, tmp_path):
    """The same data, without what earlier tests kept in it."""
    folder = shutil.copytree(mails, tmp_path / "mails")
    shutil.rmtree(folder / "baselines", ignore_errors=True)
    return PreparedData.open(folder)


def right(baseline, data, part="test"):
    asked = np.isin(baseline.rows, data.rows("random", part))
    return float((baseline.probabilities[asked].argmax(1) == data.labels[baseline.rows[asked]]).mean())


def test_each_baseline_finds_what_is_there_to_find(copied):
    found = {baseline.name: baseline for baseline in baselines(copied, "random", SPEC)}
    assert list(found) == [MAJORITY, TEXT, COLUMNS]
    assert right(found[MAJORITY], copied) == 0.5
    assert 0.65 < right(found[TEXT], copied) < 0.95
    assert right(found[COLUMNS], copied) == 1
    for baseline in found.values():
        np.testing.assert_allclose(baseline.probabilities.sum(1), 1, atol=1e-5)
        held_out = np.concatenate([copied.rows("random", part) for part in ("validation", "test")])
        assert baseline.rows.tolist() == sorted(held_out)
        assert baseline.train_rows == len(copied.rows("random", "train"))


def test_without_columns_the_text_is_read_alone(copied):
    assert [baseline.name for baseline in baselines(copied, "random", None)] == [MAJORITY, TEXT]


@pytest.mark.parametrize("relabelled", ["all wrong", "as word counts answer"])
def test_labels_of_test_rows_change_nothing(copied, mails, relabelled):
    """Were they read, wrong answers would ask for the strongest penalty, and right ones for the weakest."""
    plain = baselines(PreparedData.open(mails), "random", SPEC)
    labels = np.load(copied.directory / "labels.npy")
    test = copied.rows("random", "test")
    answers = plain[1].probabilities[np.isin(plain[1].rows, test)].argmax(1)
    labels[test] = (answers + 1) % 3 if relabelled == "all wrong" else answers
    np.save(copied.directory / "labels.npy", labels)
    changed = baselines(copied, "random", SPEC)
    for one, other in zip(changed, plain, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert right(changed[1], copied) == (relabelled != "all wrong"), "whoever looks at them would see it"


def test_what_was_fitted_is_kept_with_the_data(copied, monkeypatch):
    first = baselines(copied, "random", SPEC)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # it cannot be imported again
    monkeypatch.setattr(module, "installed", lambda: False)
    for one, other in zip(first, baselines(copied, "random", SPEC), strict=True):
        assert (one.name, one.train_rows) == (other.name, other.train_rows)
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
    kept = {baseline.name for baseline in baselines(copied, "random", TabularSpec.of(numeric=("amount",)))}
    assert COLUMNS not in kept, "other columns are another baseline"


def test_they_are_fitted_beside_other_work(copied, monkeypatch):
    with fitted_beside(copied, "random", SPEC):
        pass
    monkeypatch.setattr(module, "installed", lambda: False)  # so nothing more is fitted
    assert [baseline.name for baseline in baselines(copied, "random", SPEC)] == [MAJORITY, TEXT, COLUMNS]


def test_work_that_fails_ends_the_fitting_beside_it(copied):
    with pytest.raises(KeyError), fitted_beside(copied, "random", SPEC):
        raise KeyError
    assert not (copied.directory / "baselines").exists()


def test_a_damaged_file_is_named_with_the_way_out(copied):
    baselines(copied, "random", None)
    (path,) = (copied.directory / "baselines").iterdir()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ArtifactError, match=rf"{path} is damaged .* rm {path}"):
        baselines(copied, "random", None)


@pytest.mark.parametrize("penalties", [(1e-6, 1.0), (1.0, 1e-6)])
def test_validation_rows_choose_the_penalty_of_the_text(copied, monkeypatch, penalties):
    monkeypatch.setattr(module, "PENALTIES", penalties)
    assert right(baselines(copied, "random", None)[1], copied) > 0.65
    shutil.rmtree(copied.directory / "baselines")
    monkeypatch.setattr(module, "PENALTIES", (1e-6,))
    assert right(baselines(copied, "random", None)[1], copied) == 0.5, "which alone answers the most frequent label"


@pytest.mark.filterwarnings("error")
def test_the_beginning_of_a_text_is_read(copied, monkeypatch):
    monkeypatch.setattr(module, "MOST_CHARACTERS", len("number "))
    assert right(baselines(copied, "random", None)[1], copied) == 0.5, "the telling word stands behind that"


def test_many_rows_are_sampled(copied, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 50)
    few = baselines(copied, "random", None)[1]
    assert 50 <= few.train_rows <= 53
    assert len(few.rows) == 100
    logits = np.eye(3)[copied.labels[copied.rows("random", "test")]]
    found = standing(copied, "random", "test", None, logits)
    assert (found.rows, found.rivals[1].rows) == (100, 50)
    assert found.rivals[1].model_accuracy == 1, "the model's answers are those of the same rows"


def test_a_label_too_rare_to_be_drawn_is_there_all_the_same(copied, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 1)
    for baseline in baselines(copied, "random", SPEC):
        assert 3 <= baseline.train_rows <= 4
        assert baseline.probabilities.shape == (2, 3)
        assert (baseline.probabilities > 0).all()


def test_without_scikit_learn_the_majority_remains_and_the_command_is_named(copied, monkeypatch):
    monkeypatch.setattr(module, "installed", lambda: False)
    found = standing(copied, "random", "test", None, np.eye(3)[copied.labels[copied.rows("random", "test")]])
    assert [rival.name for rival in found.rivals] == [MAJORITY]
    assert found.markdown().endswith("scikit-learn is missing: pip install 'bertforge[baselines]'")
    assert not (copied.directory / "baselines").exists()


@pytest.fixture
def beside(copied):
    """Where a model stands whose answers are wrong on the first `wrong` test rows."""

    def stand(wrong=0, logits=None):
        labels = copied.labels[copied.rows("random", "test")]
        answers = np.where(np.arange(len(labels)) < wrong, (labels + 1) % 3, labels)
        return standing(copied, "random", "test", None, np.eye(3)[answers] if logits is None else logits(labels))

    return stand


def test_a_better_model_is_called_better(beside):
    found = beside()
    assert found.is_ahead
    assert not found.missing
    assert found.verdict.startswith(f"the model beats {TEXT}: 100.0% beside ")
    assert (found.accuracy, found.macro_f1, found.best.name) == (1, 1, TEXT)
    assert Standing.from_dict(found.to_dict()) == found


def test_a_model_that_is_not_better_is_told_so(beside):
    text = beside().rivals[1].accuracy
    wrong = round(100 * (1 - text))
    level, behind = beside(wrong - 1), beside(wrong + 5)
    assert level.verdict.startswith(f"the model is not clearly better than {TEXT}: ")
    assert behind.verdict.startswith(f"the model does not beat {TEXT}: ")
    for found in (level, behind):
        assert (found.is_ahead, found.learnt_nothing) == (False, False)


def test_a_model_no_better_than_the_majority_is_told_so(beside):
    found = beside(55)
    assert found.verdict.startswith(f"the model does not beat {MAJORITY}: 45.0% beside 50.0%, difference -5.0 points (")
    assert found.learnt_nothing


def test_a_model_of_one_label_is_told_so(beside):
    found = beside(logits=lambda labels: np.tile([0.0, 0.0, 1.0], (len(labels), 1)))
    assert found.verdict == "the model gives all 100 rows the same label, 'spam': it has learnt nothing"
    assert found.learnt_nothing
    assert beside(55).only_label is None


def test_a_manifest_of_something_else_is_refused():
    with pytest.raises(ArtifactError, match="train again"):
        Standing.from_dict({"rivals": [{"name": "x"}]})
