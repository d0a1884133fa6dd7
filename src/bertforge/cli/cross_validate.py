"""`bertforge cross-validate`: a run for each fold of prepared data, judged on all its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertforge.cli.train import Model, RecipeFile, Settings, Variant
from bertforge.terminal import Terminal

if TYPE_CHECKING:
    from bertforge.training.config import Recipe


def cross_validate(
    data: Annotated[Path, typer.Option(help="Folder made by `bertforge prepare --folds 5`.")],
    out: Annotated[Path, typer.Option(help="Folder to write: a run for each fold, and the result.")],
    variant: Variant = None,
    recipe: RecipeFile = None,
    model: Model = None,
    settings: Settings = None,
) -> None:
    """Train and test on every fold, for a figure that all rows have a part in.

    The folds' test rows are judged by models that have not learnt from
    them, and counted together. Runs that are finished are kept, and an
    interrupted one goes on: give the same command again.

    Example:

        bertforge prepare mails.csv --out data --folds 5 \\
            --text-columns subject,message --label-column folder
        bertforge cross-validate --data data --out folds
    """
    from bertforge.autofit import cross_validation
    from bertforge.cli.train import chosen_recipe
    from bertforge.cli.train import run as train

    console = Terminal()
    chosen = chosen_recipe(variant, recipe, model, settings)

    def shown(data: Path, folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any]:
        return train(data, folder, recipe, resume=resume, again="the same command goes on")

    result = cross_validation.cross_validate(data, out, chosen, console.print, shown)
    console.print(cross_validation.table(result))
    console.print(f"wrote {out / cross_validation.RESULT}")
