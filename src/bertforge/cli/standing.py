"""How a finished run stands beside the baselines, and what to try where it does not beat them."""

from __future__ import annotations

from typing import Any

from bertforge.evaluation.standing import Standing
from bertforge.terminal import Terminal


def print_standing(console: Terminal, manifest: dict[str, Any]) -> None:
    """The table of the model and its baselines on validation rows, its verdict, and what to try next."""
    found = Standing.from_dict(manifest["baselines"])
    console.print(found.markdown())
    if not found.is_ahead:
        console.print(what_to_try(found, manifest["recipe"]))


def what_to_try(found: Standing, recipe: dict[str, Any]) -> str:
    """One line for a model that does not beat its baselines."""
    longer = f"more epochs (--set epochs={2 * recipe['epochs']})"
    if found.learnt_nothing:
        return (
            f"try --set class_weights=balanced, {longer}, or a learning rate three times higher or lower "
            f"(--set lr={3 * recipe['lr']:.1g} or lr={recipe['lr'] / 3:.1g})"
        )
    if recipe["lora"]:
        return f"try to train every weight instead of adapters: --variant bert-base --model {recipe['model']}"
    return f"try {longer}, a larger model (--model bert-base-uncased), or more labelled rows"
