"""Settings that a recipe leaves open: what they come to for tables of every size, and what a recipe fixes."""

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from bertforge.data.loader import Examples, Split
from bertforge.data.schema import QUESTIONS, Schema
from bertforge.data.tokens import TokenStore
from bertforge.model.config import BertConfig
from bertforge.training.config import Recipe, load_recipe
from bertforge.training.schedule import MOST_EPOCHS, STEPS, STEPS_PER_CLASS, Schedule

MAILS = Schema("table", ("text",), "folder")
LORA = load_recipe("lora-r8-all")
FULL = Recipe()


def derived(recipe=LORA, rows=3200, tokens=20, classes=2, width=384):
    """The schedule for so many train rows of so many tokens each."""
    store = TokenStore(np.empty(0, np.uint16), np.arange(rows + 1, dtype=np.int64) * tokens)
    examples = Examples(store, np.empty(0, np.int64), sep_id=2, max_length=recipe.max_length)
    config = BertConfig(hidden_size=width, labels=tuple(f"class {number}" for number in range(classes)))
    return Schedule.of(recipe, Split(examples, np.arange(rows), np.arange(0)), config)


def steps(schedule, rows):
    return schedule.epochs * math.ceil(rows / schedule.rows_per_step)


def test_a_small_table_by_hand():
    wanted = STEPS + 2 * STEPS_PER_CLASS
    assert derived(rows=3200, tokens=18) == Schedule(
        rows_per_step=32,
        tokens_per_step=32 * 512,
        epochs=max(3, math.ceil(wanted / 100)),
        lr=2e-3,
        head_lr=2e-3,
        warmup=0.1,
    )


@pytest.mark.parametrize("tokens", [5, 20, 500])
@pytest.mark.parametrize("classes", [2, 77])
def test_a_run_has_hundreds_of_steps_whatever_the_tables_size_and_no_more_than_needed(tokens, classes):
    wanted, last = STEPS + classes * STEPS_PER_CLASS, MOST_EPOCHS
    for rows in (80, 800, 10_000, 150_000, 4_000_000):
        schedule = derived(rows=rows, tokens=tokens, classes=classes)
        found = steps(schedule, rows)
        assert schedule.epochs <= last, "more rows, fewer epochs"
        last = schedule.epochs
        assert found >= wanted or schedule.epochs == MOST_EPOCHS
        assert found >= 150
        fewer = found - math.ceil(rows / schedule.rows_per_step)
        assert fewer < wanted or schedule.epochs <= 3, "an epoch less would be too few"
    assert last == 1


def test_a_step_is_a_number_of_rows_whatever_their_length():
    assert [derived(rows=rows).rows_per_step for rows in (125, 126, 500, 501, 4_000_000)] == [8, 16, 16, 32, 32]
    for tokens in (3, 512):
        schedule = derived(tokens=tokens)
        assert schedule.rows_per_step == 32
        assert schedule.tokens_per_step >= 32 * tokens, "the longest rows are no fewer"
    assert derived(replace(LORA, rows_per_step=100)).tokens_per_step == 100 * 512


def test_tokens_alone_lift_the_limit_on_rows():
    schedule = derived(replace(LORA, tokens_per_step=4000), rows=20_000, tokens=20)
    assert (schedule.rows_per_step, schedule.tokens_per_step) == (None, 4000)
    assert schedule.epochs == math.ceil((STEPS + 2 * STEPS_PER_CLASS) / (20_000 / 200)), "200 rows a step"
    both = derived(replace(LORA, tokens_per_step=4000, rows_per_step=10), rows=20_000, tokens=20)
    assert (both.rows_per_step, both.tokens_per_step, both.epochs) == (10, 4000, 3)


def test_learning_rates_are_those_of_the_kind_of_training_and_fall_with_the_width():
    assert (derived(LORA).lr, derived(FULL).lr) == (2e-3, 1e-4)
    assert (derived(LORA, width=768).lr, derived(FULL, width=768).lr) == (1e-3, 5e-5)
    assert derived(FULL, width=1152).lr == 3.3e-5, "two digits are enough"
    assert derived(FULL).head_lr == derived(FULL).lr
    columns = replace(FULL, tabular=load_recipe("columns").tabular)
    assert (derived(columns).lr, derived(columns).head_lr) == (1e-4, 1e-3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rows_per_step", 5), ("tokens_per_step", 777), ("epochs", 4), ("lr", 0.3), ("head_lr", 0.2), ("warmup", 0.0)],
)
def test_what_the_recipe_fixes_stays(setting, value):
    assert getattr(derived(), setting) != value
    assert getattr(derived(replace(LORA, **{setting: value})), setting) == value
    assert {field.name for field in fields(Schedule)} <= {field.name for field in fields(Recipe)}


def test_the_line_before_training_says_what_was_chosen():
    said = derived(rows=3200, tokens=18).describe(3200, 17.6, 300)
    assert said == (
        "3,200 rows of 18 tokens: 32 rows a step, 3 epochs, 300 steps, learning rate 0.002; --set to change"
    )
    one = derived(replace(LORA, tokens_per_step=4096, epochs=1, lr=1e-4, head_lr=1e-3))
    assert "up to 4,096 tokens a step, 1 epoch, 9 steps, learning rate 0.0001 (head 0.001);" in one.describe(9, 9, 9)


def test_the_documents_say_the_same():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    schedule = derived(rows=800, tokens=26, classes=3)
    assert f"\n{schedule.describe(800, 26, steps(schedule, 800))}\n" in text
    assert f"it takes to {STEPS} steps and {STEPS_PER_CLASS} more for each class, but {MOST_EPOCHS} at most" in text


# What the six variants, and `columns`, were before settings were derived.
TUNED = {
    "bert-base": {"lr": 5e-5, "epochs": 2, "tokens_per_step": 4096},
    "bert-base-tabular": {"lr": 5e-5, "head_lr": 1e-3, "epochs": 2, "tokens_per_step": 4096},
    "bert-overflow": {"lr": 5e-5, "epochs": 2, "tokens_per_step": 4096},
    "lora-r1": {"lr": 2e-3, "epochs": 4, "tokens_per_step": 4096},
    "lora-r8": {"lr": 1e-3, "epochs": 3, "tokens_per_step": 4096},
    "lora-r8-last-4": {"lr": 1e-3, "epochs": 4, "tokens_per_step": 4096},
    "columns": {"lr": 5e-5, "head_lr": 1e-3, "epochs": 2, "tokens_per_step": 8192},
}


@pytest.mark.parametrize(("name", "tuned"), TUNED.items())
def test_on_the_stack_overflow_questions_a_variant_is_what_it_was(name, tuned):
    recipe = load_recipe(name).on(QUESTIONS)
    expected = {"rows_per_step": None, "head_lr": tuned["lr"], "warmup": 0.06} | tuned
    assert derived(recipe, rows=35_903, tokens=184, width=768).to_dict() == expected
    assert (recipe.start, recipe.stackoverflow) == ("random", None)


@pytest.mark.parametrize("name", TUNED)
def test_on_any_other_table_a_variants_settings_are_derived(name):
    recipe = load_recipe(name).on(MAILS)
    assert (recipe.start, recipe.stackoverflow) == ("", None)
    assert recipe == replace(load_recipe(name), stackoverflow=None)
    assert derived(recipe).rows_per_step == 32


def test_what_the_user_sets_wins_over_what_was_tuned():
    settings = {"lr": 3e-4, "epochs": 7, "tokens_per_step": 1024, "warmup": 0.0, "start": "probe", "head_lr": 1e-2}
    given = [f"{name}={value}" for name, value in settings.items()]
    for name in TUNED:
        recipe = load_recipe(name).with_settings(given).on(QUESTIONS)
        assert {setting: getattr(recipe, setting) for setting in settings} == settings
    rows = load_recipe("lora-r8").with_settings(["rows_per_step=16"]).on(QUESTIONS)
    assert (rows.rows_per_step, rows.tokens_per_step, rows.lr) == (16, None, 1e-3), "a step is what the user says"


def test_adapters_in_a_recipe_without_any_do_not_learn_at_its_rates():
    opened = load_recipe("bert-base").with_settings(["lora.r=4"]).on(QUESTIONS)
    assert opened.lr is None
    assert derived(opened, width=768).lr == 1e-3
    assert load_recipe("lora-r8").with_settings(["lora.r=4"]).on(QUESTIONS).lr == 1e-3
