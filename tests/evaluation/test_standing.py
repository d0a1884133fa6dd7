"""What is said of a model follows from its rivals, whatever their order; test_baselines.py fits them."""

from dataclasses import replace

from bertforge.evaluation.baselines import COLUMNS, MAJORITY, TEXT
from bertforge.evaluation.bootstrap import Estimate
from bertforge.evaluation.standing import Rival, Standing

AHEAD, LEVEL = Estimate(0.1, 0.05, 0.15), Estimate(0.01, -0.02, 0.04)
MAJOR = Rival(MAJORITY, 100, 0.5, 0.3, 0.8, AHEAD, 800, 0.0)
WORDS = Rival(TEXT, 100, 0.79, 0.7, 0.8, LEVEL, 800, 1.0)
TREES = Rival(COLUMNS, 100, 0.6, 0.6, 0.8, AHEAD, 800, 2.0)


def stand(*rivals):
    return Standing("validation", 100, 0.8, 0.75, None, rivals)


def test_the_best_baseline_is_the_one_to_beat_wherever_it_stands():
    for found in (stand(MAJOR, WORDS, TREES), stand(MAJOR, TREES, WORDS)):
        assert found.best == WORDS
        assert not found.is_ahead
        assert found.verdict.startswith(f"the model is not clearly better than {TEXT}: 80.0% beside 79.0%")
    alone = stand(MAJOR, TREES)
    assert alone.is_ahead
    assert alone.verdict == (f"the model beats {COLUMNS}: 80.0% beside 60.0%, difference +10.0 points (+5.0 to +15.0)")
    strong = replace(MAJOR, accuracy=0.9, model_accuracy=0.9, lead=LEVEL)
    assert stand(strong, WORDS).verdict.startswith(f"the model is not clearly better than {MAJORITY}: 90.0%")


def test_the_table_begins_with_the_model():
    found = stand(MAJOR, WORDS)
    assert [row[:3] for row in found.table()] == [
        ("the model", "80.0%", "75.0%"),
        (MAJORITY, "50.0%", "30.0%"),
        (f"{TEXT}, fitted on 800 rows in 1 s", "79.0%", "70.0%"),
    ]
    assert "| on 100 validation rows | accuracy | macro F1 |" in found.markdown()
