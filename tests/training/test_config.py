"""Recipes: the variants, one's own, changes by `--set`, and errors that say what is known."""

import json
from dataclasses import fields

import pytest

from bertforge.errors import UsageError
from bertforge.training.config import LoraRecipe, Recipe, load_recipe, variants

EIGHT = [
    *("bert-base", "bert-base-tabular", "bert-overflow", "columns"),
    *("lora-r1", "lora-r8", "lora-r8-all", "lora-r8-last-4"),
]


def test_every_variant_loads_under_its_name():
    assert variants() == EIGHT
    for name in EIGHT:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert (recipe.lora is not None) == name.startswith("lora")
        assert (recipe.tabular is not None) == (name in ("bert-base-tabular", "columns"))
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert load_recipe("lora-r1").lora.r == 1
    assert load_recipe().name == "lora-r8-all"


def test_an_unknown_variant_lists_those_there_are():
    with pytest.raises(UsageError, match=f"variant 'lora-r9' does not exist; choose one of {', '.join(EIGHT)}$"):
        load_recipe("lora-r9")


def test_a_recipe_of_ones_own_is_named_after_its_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('epochs = 3\nlr = 1\n[lora]\nr = 2\ntarget_modules = ["query"]\n')
    recipe = load_recipe(path=path)
    assert recipe == Recipe(name="mine", epochs=3, lr=1.0, lora=LoraRecipe(r=2, target_modules=("query",)))
    path.write_text("epochs = \n")
    with pytest.raises(UsageError, match=r"mine\.toml is not TOML"):
        load_recipe(path=path)
    path.write_bytes(b"epochs = 3 # caf\xe9\n")
    with pytest.raises(UsageError, match=r"mine\.toml is not UTF-8 text \(.* at byte 16\)"):
        load_recipe(path=path)
    with pytest.raises(UsageError, match=r"absent\.toml cannot be read \(No such file"):
        load_recipe(path=tmp_path / "absent.toml")


def test_settings_change_what_they_name_and_nothing_else():
    recipe = load_recipe("lora-r8").with_settings(["epochs=4"])
    changed = recipe.with_settings(
        ["epochs=2", "lr=1e-4", "model=some/model", "lora.r=4", "lora.target_modules=query,key"]
    )
    assert (changed.epochs, changed.lr, changed.model) == (2, 1e-4, "some/model")
    assert (changed.lora.r, changed.lora.target_modules) == (4, ("query", "key"))
    named = {"epochs", "lr", "model", "lora"}
    assert all(
        getattr(changed, field.name) == getattr(recipe, field.name)
        for field in fields(Recipe)
        if field.name not in named
    )
    assert changed.lora.lora_alpha == recipe.lora.lora_alpha
    assert recipe.epochs == 4, "the recipe itself is not changed"


def test_a_setting_may_open_a_section():
    changed = load_recipe("bert-base").with_settings(['tabular.numeric=["hour"]', "lora.r=1"])
    assert changed.tabular.columns == ["hour"]
    assert changed.lora == LoraRecipe(r=1)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "epoch=2",
            "epoch is not a setting; did you mean epochs\\? known: name, model, .*; `bertforge train --set list`",
        ),
        ("lora.rank=2", r"lora\.rank is not a setting; .*known: lora\.r, lora\.lora_alpha"),
        ("optim.lr=2", "there is no section 'optim'; sections are lora and tabular"),
        ("epochs", "'epochs' is not name=value; write for example --set epochs=2"),
        ("epochs=2.5", "epochs=2.5 should be a whole number"),
        ("epochs=true", "epochs=True should be a whole number"),
        ("lr=fast", "lr='fast' should be a number"),
        ("lora.target_modules=[1]", r"lora\.target_modules=\[1\] should be names"),
        ("lora=5", "lora=5 should be a section, as in --set lora.NAME=VALUE"),
        ("epochs=0", "epochs=0 must be above 0"),
        ("lr=nan", "lr=nan is not a finite number"),
        ("max_grad_norm=inf", "max_grad_norm=inf is not a finite number"),
        ("lora.lora_alpha=-inf", r"lora\.lora_alpha=-inf is not a finite number"),
        ("lora.lora_alpha=0", r"lora_alpha=0\.0 is not a finite number above 0; twice r is usual, here 16"),
        ("lora.r=0", "r=0 is not a rank; use 1 or more"),
        ("head_lr=-1", "head_lr=-1.0 must be above 0"),
        ("seed=-1", "seed=-1 must not be below 0"),
        ("prefix_cache_gb=-1", "prefix_cache_gb=-1.0 must not be below 0; 0 keeps nothing"),
        ("prefix_cache_gb=much", "prefix_cache_gb='much' should be a number"),
        ("precision=fp64", "precision='fp64' is not one of auto, fp32, bf16, fp8"),
        ("class_weights=heavy", "class_weights='heavy' is not one of none, balanced"),
        ("label_smoothing=1", "are shares between 0 and 1"),
        ("max_length=2", "max_length=2 leaves no token between"),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_value(setting, said):
    with pytest.raises(UsageError, match=said) as error:
        load_recipe("lora-r8").with_settings([setting])
    assert "\n" not in str(error.value)


def test_layers_are_counted_from_the_top_of_any_model():
    recipe = LoraRecipe(last_layers=4)
    assert recipe.config(12, ("classifier",)).layers_to_transform == (8, 9, 10, 11)
    assert recipe.config(6, ("classifier",)).layers_to_transform == (2, 3, 4, 5)
    assert LoraRecipe().config(6, ("classifier",)).layers_to_transform is None
    with pytest.raises(UsageError, match=r"last_layers=4, but the model has 3 layers"):
        recipe.config(3, ("classifier",))
