"""Thresholds that keep what they promise, on rows that did not choose them."""

from contextlib import suppress

import numpy as np
import pytest

from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.evaluation.binomial import lower_bound
from bertforge.evaluation.decisions import Policy, bias, for_costs, for_precision, outcome

TWO, THREE = ("open", "closed"), ("a", "b", "c")


def two_labels(rows, seed, spread=2.0):
    """Calibrated probabilities `[rows, 2]` and labels."""
    generator = np.random.default_rng(seed)
    closed = 1 / (1 + np.exp(-generator.normal(0, spread, rows)))
    return np.stack([1 - closed, closed], axis=1), (generator.random(rows) < closed).astype(np.int64)


def three_labels(rows, seed):
    generator = np.random.default_rng(seed)
    chances = generator.dirichlet((0.4, 0.4, 0.4), rows)
    return chances, (chances.cumsum(axis=1) < generator.random((rows, 1))).sum(axis=1).astype(np.int64)


def test_a_row_below_its_threshold_goes_to_the_other_label_or_to_a_person():
    chances = np.array([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5], [0.3, 0.7], [0.05, 0.95], [np.nan, np.nan]])
    band = Policy(TWO, (0.75, 0.9))
    assert band.names(band.decide(chances)) == ["open", *["abstain"] * 3, "closed", "abstain"]
    early = Policy(TWO, (0.7, 0.3))  # no row is left to a person
    assert early.names(early.decide(chances[:5]), (0, 1)) == [0, 1, 1, 1, 1]
    three = Policy(THREE, (0.5, 0.0, 0.5))
    assert three.decide([[0.6, 0.3, 0.1], [0.45, 0.1, 0.45], [0.3, 0.4, 0.3]]).tolist() == [0, -1, 1]
    assert Policy(TWO, (0.5, 1.5)).decide(np.array([[0.0, 1.0]])).tolist() == [-1], "above 1: never"


@pytest.mark.parametrize(("target", "rows"), [(0.8, 1000), (0.9, 4000)])
def test_the_promised_precision_holds_on_new_rows_where_the_plain_share_breaks_it(target, rows):
    new = two_labels(400_000, 99)[0][:, 1]  # the precision above a threshold is the mean of what lies above it
    broken = plain = 0
    for seed in range(60):
        chances, labels = two_labels(rows, seed)
        chosen = for_precision(chances, labels, TWO, {"closed": target}).thresholds[1]
        broken += new[new >= chosen].mean() < target
        order = np.argsort(-chances[:, 1])
        share = np.cumsum(labels[order]) / np.arange(1, rows + 1)
        naive = chances[order][np.flatnonzero(share >= target)[-1], 1]
        plain += new[new >= naive].mean() < target
    assert broken <= 8, "5% of 60 are 3"
    assert plain >= 20


def test_the_threshold_is_the_lowest_that_the_rows_show():
    chances, true = two_labels(2000, 1)
    policy = for_precision(chances, true, TWO, {"closed": 0.9})
    found = outcome(policy, chances, true).answers[1]
    assert found.at_least >= 0.9
    assert found.at_least == lower_bound(np.array([found.right]), np.array([found.rows]))[0]
    above = chances[:, 1] >= np.sort(chances[chances[:, 1] < policy.thresholds[1], 1])[-1]
    assert lower_bound(np.array([true[above].sum()]), np.array([above.sum()]))[0] < 0.9, "one row more does not"
    assert sum(policy.thresholds) == pytest.approx(1), "every other row is open"
    assert outcome(policy, chances, true).coverage.value == 1


def test_nothing_is_promised_where_precision_is_just_below_the_target_everywhere():
    generator, promised = np.random.default_rng(0), 0
    for _ in range(50):
        closed = np.sort(generator.random(1000))
        chances, true = np.stack([1 - closed, closed], axis=1), (generator.random(1000) < 0.899).astype(np.int64)
        with suppress(DataError):
            for_precision(chances, true, TWO, {"closed": 0.9})
            promised += 1
    assert promised <= 7, "5% of 50 are 2.5; by the lowest threshold that shows it there are 15"


def test_two_labels_with_a_precision_each_are_shown_on_the_rows_that_they_answer():
    generator = np.random.default_rng(1)
    closed = generator.random(4000)
    right = np.where(closed >= 0.5, 0.9, np.where(closed >= 0.3, 1.0, 0.0))
    true = (generator.random(4000) < right).astype(np.int64)
    chances = np.stack([1 - closed, closed], axis=1)
    wanted = {"closed": 0.88, "open": 0.5}
    policy = for_precision(chances, true, TWO, wanted)
    for answers in outcome(policy, chances, true).answers:
        assert answers.at_least >= wanted[answers.label]


def test_rows_of_one_score_are_taken_or_left_together():
    chances = np.repeat([[0.1, 0.9], [0.4, 0.6], [0.8, 0.2]], 100, axis=0)
    true = np.r_[np.ones(100), np.repeat([1, 0], [97, 3]), np.zeros(100)].astype(np.int64)
    policy = for_precision(chances, true, TWO, {"closed": 0.95})
    assert outcome(policy, chances, true).answers[1].rows == 200
    assert 0.2 < policy.thresholds[1] < 0.6, "between two scores, so that no rounding decides"


def test_one_precision_for_all_answers_has_one_threshold():
    chances, true = three_labels(3000, 0)
    policy = for_precision(chances, true, THREE, {"": 0.9})
    found = outcome(policy, chances, true)
    assert len(set(policy.thresholds)) == 1
    assert found.at_least >= 0.9 > (chances.argmax(axis=1) == true).mean()
    assert 0 < found.coverage.low < found.coverage.value < found.coverage.high < 1
    assert sum(label.rows for label in found.answers) == round(found.coverage.value * 3000)


def test_of_more_labels_each_has_its_own_and_the_others_are_always_said():
    chances, true = three_labels(3000, 0)
    policy = for_precision(chances, true, THREE, {"b": 0.9, "c": 0.8})
    found = outcome(policy, chances, true)
    assert policy.thresholds[0] == 0
    assert policy.thresholds[1] > policy.thresholds[2] > 0
    assert found.answers[1].at_least >= 0.9
    assert found.answers[2].at_least >= 0.8
    assert found.answers[0].rows == (chances.argmax(axis=1) == 0).sum()
    assert (policy.decide(chances) == -1).any()


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"shut": 0.9}, UsageError, "precision names the label 'shut', but the model knows open, closed"),
        ({"": 1.0}, UsageError, "precision 1 must lie between 0 and 1, such as 0.95"),
        ({"": 0.9, "open": 0.9}, UsageError, "one precision for all answers, or one for each"),
        (
            {"closed": 0.999},
            DataError,
            r"answers 'closed' a precision of 0\.999 .* the best is 0\.\d+, from 0\.\d+ on, where .* \(2,995 at",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_best_there_is(wanted, error, said):
    chances, true = two_labels(300, 0)
    with pytest.raises(error, match=said):
        for_precision(chances, true, TWO, wanted)


def test_a_label_that_is_never_given_has_no_threshold():
    chances = np.tile([0.5, 0.3, 0.2], (100, 1))
    with pytest.raises(DataError, match="no validation row gets answers 'c'"):
        for_precision(chances, np.zeros(100, np.int64), THREE, {"c": 0.9})


@pytest.mark.parametrize("person", [None, 0.4])
def test_costs_choose_what_is_cheapest_on_new_rows(person):
    costs = {"closed": 5.0}
    chances, true = two_labels(100_000, 3)
    cheapest = outcome_cost(for_costs(TWO, costs, person), chances, true, 5.0, person)
    for closed in np.linspace(0.05, 0.95, 19):
        for opened in np.linspace(0.05, 0.95, 19) if person else [1 - closed]:
            other = outcome_cost(Policy(TWO, (opened, closed)), chances, true, 5.0, person)
            assert cheapest <= other + 0.004  # the error of a mean over 100,000 rows
    found = outcome(for_costs(TWO, costs, person), chances[:4000], true[:4000], costs, person)
    assert found.cost.low < found.cost.value < found.cost.high < found.cost_undecided.low
    assert (found.coverage.value < 1) == (person == 0.4)


@pytest.mark.parametrize(("labels", "costs", "most"), [(TWO, {"closed": 5}, 5 / 6), (TWO, {}, 0.5), (THREE, {}, 2 / 3)])
def test_a_person_whom_nobody_would_ask_is_refused(labels, costs, most):
    unsure = np.full((1, len(labels)), 1 / len(labels)) if not costs else np.array([[1 / 6, 5 / 6]])
    assert for_costs(labels, costs, most - 1e-6).decide(unsure) == [-1], "the least sure row there can be"
    with pytest.raises(UsageError, match=rf"nobody would be asked: .* must cost less than {most:.4g}"):
        for_costs(labels, costs, most + 1e-6)


def outcome_cost(policy, chances, true, closed, person):
    decided = policy.decide(chances)
    price = np.where(decided == -1, person or 0.0, np.where(decided == 1, closed, 1.0))
    return np.where(decided == true, 0.0, price).mean()


def test_more_labels_have_thresholds_where_these_are_the_cheapest():
    assert for_costs(THREE, {}, 0.6).thresholds == (0.4,) * 3
    assert for_costs(THREE, {"b": 5}, 0.5).thresholds == (0.5, 0.9, 0.5)
    with pytest.raises(UsageError, match="costs of 3 labels are weighed against a person's"):
        for_costs(THREE, {"b": 5}, None)
    with pytest.raises(UsageError, match=r"half of the cheapest at most, 0\.5; --abstain is 0\.6"):
        for_costs(THREE, {"b": 5}, 0.6)
    with pytest.raises(UsageError, match="cost names the label 'shut'"):
        for_costs(TWO, {"shut": 5}, None)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="costs must be above 0"):
            for_costs(TWO, {"closed": wrong}, None)


def test_probabilities_that_no_cost_can_be_reckoned_with_are_told():
    chances, true = two_labels(4000, 5)
    assert bias(chances, true, TWO) == ""
    odds = chances * (1, 2)  # as after training with class weights
    assert "--prior" in bias(odds / odds.sum(axis=1, keepdims=True), true, TWO)


def test_a_policy_comes_back_from_a_manifest():
    policy = Policy(TWO, (0.7, 0.30000001), (0.94, 0.06))
    assert Policy.of({"labels": list(TWO), "decision": policy.to_dict()}) == policy
    assert Policy.of({"labels": list(TWO)}) is None
    with pytest.raises(ArtifactError, match="thresholds are damaged"):
        Policy.of({"labels": list(TWO), "decision": {"thresholds": {"open": 1}, "prior": None}})


def test_nothing_answered_has_no_precision():
    chances, true = two_labels(50, 0)
    found = outcome(Policy(TWO, (1.5, 1.5)), chances, true)
    assert (found.precision, found.at_least, found.coverage.value) == (None, None, 0)
    assert "| all answers |  | 0 | 0 | - | - |  |" in found.markdown()
