"""Cross-validation: every row is tested once, finished folds are kept, and other settings are refused."""

import json

import pytest

from bertforge.autofit.cross_validation import RESULT, cross_validate, table
from bertforge.data.prepare import PrepareOptions
from bertforge.errors import ArtifactError, DataError
from bertforge.training.finetune import finetune
from tests.autofit.tables import mails
from tests.runs import prepare_frame, quick_recipe, run_command


@pytest.fixture(scope="module")
def folded(tmp_path_factory, base):
    options = PrepareOptions(text_columns=("message",), label_column="folder", folds=2)
    return prepare_frame(mails(), tmp_path_factory.mktemp("folds") / "data", base, options)


def test_every_row_is_tested_once_and_finished_folds_are_kept(folded, base, tmp_path):
    trained = []

    def train(data, run, recipe, resume):
        if trained == ["fold-1"]:
            trained.append("interrupted")
            raise KeyboardInterrupt
        trained.append(recipe.split)
        return finetune(data, run, recipe, resume=resume)

    learns = {"epochs": 8, "tokens_per_step": 128}
    recipe, out = quick_recipe(base, **learns), tmp_path / "folds"
    with pytest.raises(KeyboardInterrupt):
        cross_validate(folded, out, recipe, print, train)
    found = cross_validate(folded, out, recipe, print, train)
    assert trained == ["fold-1", "interrupted", "fold-2"]
    assert found == json.loads((out / RESULT).read_text())
    assert list(found["folds"]) == ["fold-1", "fold-2"]
    rows = {fold: metrics["rows"] for fold, metrics in found["folds"].items()}
    assert sum(rows.values()) == found["pooled"]["rows"] == 200
    right = sum(rows[fold] * metrics["accuracy"]["value"] for fold, metrics in found["folds"].items())
    assert found["pooled"]["accuracy"]["value"] == pytest.approx(right / 200)
    assert found["pooled"]["accuracy"]["value"] > 0.8, "the words tell the label"
    assert table(found).splitlines()[-1].startswith("| all rows | 200 | ")
    with pytest.raises(ArtifactError, match=r"fold-1 was trained with lr 0\.002, not 0\.001; name another folder"):
        cross_validate(folded, out, quick_recipe(base, **learns, lr=1e-3), print, train)


def test_data_without_folds_says_how_to_make_them(data, base, tmp_path):
    with pytest.raises(DataError, match=r"has no folds; make them with `bertforge prepare TABLE --out DIR --folds 5`"):
        cross_validate(data, tmp_path / "folds", quick_recipe(base), print, finetune)


def test_on_the_command_line(folded, base, tmp_path, capsys):
    quick = ("--model", base, "--set", "epochs=1", "max_length=48", "precision=fp32")
    assert run_command("cross-validate", "--data", folded, "--out", tmp_path / "folds", *quick) == 0
    said = capsys.readouterr().out
    assert "| all rows | 200 | " in said
    assert f"wrote {tmp_path / 'folds' / RESULT}" in said
