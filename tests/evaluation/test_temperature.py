"""The temperature that made logits too sharp is found again, and no temperature makes the loss worse."""

import numpy as np
import pytest

from bertforge.errors import DataError
from bertforge.evaluation.metrics import calibration_error
from bertforge.evaluation.scores import score
from bertforge.evaluation.temperature import COLDEST, HOTTEST, fit_temperature


def honest_rows(rows: int, labels: int, seed: int = 0):
    """Logits `[rows, labels]` and labels drawn from their own softmax, so that the right temperature is 1."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(rows, labels))
    return logits, (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)


@pytest.mark.parametrize("labels", [2, 7])
@pytest.mark.parametrize("sharpened", [0.4, 1.0, 3.0])
def test_the_temperature_of_sharpened_logits_is_found_again(labels, sharpened):
    logits, true = honest_rows(20_000, labels)
    assert fit_temperature(logits * sharpened, true) == pytest.approx(sharpened, rel=0.05)


def test_it_is_where_the_loss_is_lowest_and_repairs_the_calibration():
    logits, true = honest_rows(3_000, 3)
    logits *= 2.5
    found = fit_temperature(logits, true)
    losses = {t: score(logits / t, true).losses.mean() for t in (0.97 * found, found, 1.03 * found)}
    assert min(losses, key=losses.__getitem__) == found
    assert calibration_error(logits / found, true).value < 0.03 < 0.1 < calibration_error(logits, true).value


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_is_never_worse_than_without_and_the_labels_stay(seed):
    generator = np.random.default_rng(seed)
    rows, labels = generator.integers(1, 40), generator.integers(2, 6)
    logits = generator.normal(size=(rows, labels)) * generator.choice([0.01, 1, 30])
    true = generator.integers(labels, size=rows)
    found = fit_temperature(logits, true)
    assert COLDEST <= found <= HOTTEST
    assert score(logits / found, true).losses.mean() <= score(logits, true).losses.mean()
    assert ((logits / found).argmax(1) == logits.argmax(1)).all()


def test_rows_that_are_all_right_do_not_make_the_model_certain():
    """Of 50 right answers the rule of succession makes 51/52; the loss alone would ask for 1."""
    logits, true = np.tile([4.0, 0.0], (50, 1)), np.zeros(50, int)
    found = fit_temperature(logits, true)
    assert 0.97 < 1 / (1 + np.exp(-4 / found)) < 0.999
    assert score(logits / COLDEST, true).losses.mean() < score(logits / found, true).losses.mean()  # what it resists


def test_logits_that_say_nothing_are_left_alone():
    assert fit_temperature(np.zeros((5, 3)), np.array([0, 1, 2, 0, 1])) == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "there are no rows"),
        (np.array([[0.0, np.nan]]), np.array([0]), "NaN or infinite"),
        (np.zeros((1, 2)), np.array([2]), "row 0 has label 2"),
    ],
)
def test_nonsense_is_refused(logits, labels, said):
    with pytest.raises(DataError, match=said):
        fit_temperature(logits, labels)
