"""The search: how much it tries in which time, that the better candidate wins, and that no trial is made twice."""

import time
from dataclasses import replace

import pytest

from bertforge.autofit import search as module
from bertforge.autofit.search import (
    ETA,
    Candidate,
    Log,
    TimeUpError,
    Trial,
    Workbench,
    candidates,
    search,
    short_trials,
)
from bertforge.data.prepare import PrepareOptions
from bertforge.data.prepared import PreparedData
from tests.autofit.tables import mails
from tests.runs import prepare_frame

A_ROW, OVERHEAD, LEAST, MOST = 0.02, 2.0, 320, 4000
GOOD, BAD = Candidate(False, 1.0, False), Candidate(False, 1e-5, False)


def cost(count, rows):
    """Seconds of `count` short trials and the longer ones that follow."""
    longer = -(-count // ETA)
    return (count + longer) * OVERHEAD + (count + ETA * longer) * rows * A_ROW


@pytest.mark.parametrize("spare", [40, 60, 100, 200, 400, 1000])
def test_all_trials_fit_into_the_time(spare):
    count, rows = short_trials(spare, A_ROW, OVERHEAD, 6, LEAST, MOST)
    assert cost(count, rows) <= spare
    assert LEAST <= rows <= MOST
    assert rows == MOST or cost(count, rows + 2) > spare, "no time is given away"


def test_less_time_means_fewer_candidates():
    counts = [short_trials(spare, A_ROW, OVERHEAD, 6, LEAST, MOST)[0] for spare in (1000, 100, 70, 45, 10, -5)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 6
    assert short_trials(10, A_ROW, OVERHEAD, 6, LEAST, MOST) == (1, 0)


def test_candidates_differ_and_with_columns_each_is_tried_without_them_too():
    assert len(set(candidates(columns=True))) == 2 * len(set(candidates(columns=False))) == 12
    assert not any(candidate.columns for candidate in candidates(columns=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    options = PrepareOptions(text_columns=("message",), label_column="folder")
    return prepare_frame(mails(), tmp_path_factory.mktemp("mails") / "data", base, options)


@pytest.fixture
def bench(folder, base, monkeypatch):
    """Two candidates, one of which hardly moves from random weights; the bench counts its trials."""
    monkeypatch.setattr(module, "candidates", lambda columns: [BAD, GOOD])
    monkeypatch.setattr(module, "LEAST_STEPS", 4)
    made = Counting(PreparedData.open(folder), str(base), None, 42)
    made.precision = "fp32"
    return made


class Counting(Workbench):
    """Trials start from random weights and not from a probe, which would make all of them good."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.made = []

    def recipe(self, candidate):
        recipe, run, schedule = super().recipe(candidate)
        return recipe, replace(run, probed=False), schedule

    def trial(self, candidate, rows_seen, end):
        trial = super().trial(candidate, rows_seen, end)
        self.made.append((candidate, rows_seen))
        return trial


def test_the_better_candidate_wins_and_gets_the_rest_of_the_time(bench):
    log, said = Log(), []
    recipe = search(bench, 60.0, log, said.append)
    assert recipe.lr == bench.recipe(GOOD)[0].lr
    assert 0 < recipe.minutes < 1
    assert f"chosen: {GOOD.name} (2 candidates)" in said
    by_loss = sorted(log.trials[1:3], key=lambda trial: trial.loss)
    assert [trial.candidate for trial in by_loss] == [GOOD, BAD]
    assert by_loss[0].loss < 0.9 * by_loss[1].loss, "one is clearly worse, else this shows nothing"


def test_known_trials_are_not_made_again(bench):
    first = Log()
    chosen = search(bench, 60.0, first, lambda line: None)
    made = list(bench.made)
    assert len(made) == len(set(made)) == 4, "the gauge, two short ones and a longer one"
    again = Log(trials=first.trials[:2], count=first.count, short=first.short)
    after = search(bench, 45.0, again, lambda line: None)
    assert bench.made[4:] == made[2:]
    assert after.lr == chosen.lr
    saved = [Trial.from_dict(trial.to_dict()) for trial in first.trials]
    assert saved == first.trials


def test_a_trial_ends_when_its_time_is_up(bench):
    with pytest.raises(TimeUpError):
        bench.trial(GOOD, bench.rows, time.monotonic())
    assert bench.made == []


def test_without_time_for_a_trial_the_likeliest_candidate_is_trained(bench):
    said = []
    recipe = search(bench, 1e-3, Log(), said.append)
    assert recipe.lr == bench.recipe(BAD)[0].lr
    assert "no time to compare settings; more --minutes make a better model" in said
    assert bench.made == []
