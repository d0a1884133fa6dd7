"""`bertforge train --set list`: the settings of a recipe, their values and what they mean."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from bertforge.columns.transform import TabularSpec
from bertforge.terminal import Terminal
from bertforge.training.config import LoraRecipe, Recipe
from bertforge.training.schedule import Schedule

_DERIVED = {*(field.name for field in fields(Schedule)), "start"}  # where a recipe leaves them open


def show_settings(recipe: Recipe) -> None:
    """Prints a table of the recipe's settings, and one of each section."""
    console = Terminal()
    console.print(f"settings of {recipe.name}; change them with --set NAME=VALUE, or in a TOML file with --recipe")
    console.print(_table([Recipe], vars(recipe), "", without={"lora", "tabular", "stackoverflow"}))
    if recipe.stackoverflow:
        tuned = {name: value for name, value in vars(recipe.stackoverflow).items() if value}
        console.print(
            "on the Stack Overflow questions: " + " ".join(f"{name}={value}" for name, value in tuned.items())
        )
    values = recipe.to_dict()
    for name, classes in (("lora", [LoraRecipe]), ("tabular", TabularSpec.sections())):
        if values[name] is None:
            console.print(f"no [{name}] in this recipe; setting one of these brings the others at these values")
        console.print(_table(classes, values[name] or {}, f"{name}.", without={"kinds"}))


def _meanings(cls: type) -> dict[str, str]:
    """What stands under each field of a dataclass, in one line."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found, last = {}, ""
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            last = statement.target.id
        elif last and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            found[last] = " ".join(str(statement.value.value).split())
    return found


def _table(classes: list[Any], values: dict[str, Any], prefix: str, without: set[str]) -> Table:
    """The fields of `classes`, and the default of each that `values` lacks."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", max_width=30, overflow="fold")
    table.add_column("meaning")
    for cls in classes:
        meaning = _meanings(cls)
        for field in fields(cls):
            if field.name not in without:
                value = values.get(field.name, field.default)
                is_open = value in (None, "") and prefix + field.name in _DERIVED
                table.add_row(prefix + field.name, "derived" if is_open else _toml(value), meaning[field.name])
    return table


def _toml(value: Any) -> str:
    """As it is written after `--set NAME=`; a dash where there is nothing."""
    if value in (None, "", ()):
        return "-"
    return ",".join(value) if isinstance(value, tuple) else str(value)
