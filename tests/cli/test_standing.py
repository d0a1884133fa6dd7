"""What is proposed fits the run that fell short."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bertforge.cli.standing import print_standing
from bertforge.evaluation.baselines import MAJORITY, TEXT
from bertforge.evaluation.bootstrap import Estimate
from bertforge.evaluation.standing import Rival, Standing

AHEAD, BEHIND = Estimate(0.1, 0.05, 0.15), Estimate(-0.1, -0.15, -0.05)
MAJOR, WORDS = Rival(MAJORITY, 100, 0.5, 0.3, 0.8, AHEAD, 800, 0.0), Rival(TEXT, 100, 0.7, 0.7, 0.8, AHEAD, 800, 1.0)
GOOD = Standing("validation", 100, 0.8, 0.8, None, (MAJOR, WORDS))
BEATEN = replace(GOOD, rivals=(MAJOR, replace(WORDS, accuracy=0.9, lead=BEHIND)))
LEVEL = replace(GOOD, rivals=(replace(MAJOR, lead=BEHIND), WORDS))


@pytest.mark.parametrize(
    ("found", "lora", "said"),
    [
        (BEATEN, {"r": 8}, "--variant bert-base --model minilm"),
        (BEATEN, None, "--model bert-base-uncased"),
        (
            LEVEL,
            {"r": 8},
            "(--set epochs=8), or a learning rate three times higher or lower (--set lr=0.0002 or lr=2e-05)",
        ),
        (replace(GOOD, only_label="ham"), None, "class_weights=balanced"),
        (GOOD, {"r": 8}, None),
    ],
)
def test_what_to_try_fits_the_run(found, lora, said):
    out = io.StringIO()
    manifest = {"baselines": found.to_dict(), "recipe": {"lora": lora, "model": "minilm", "lr": 5e-5, "epochs": 4}}
    print_standing(Console(file=out, width=400), manifest)
    last = out.getvalue().splitlines()[-1]
    assert last.startswith("try ") == (said is not None)
    assert (said or found.verdict) in last
