"""`bertforge train`: a recipe and prepared data in, a run out."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bertforge.terminal import Terminal

if TYPE_CHECKING:
    from bertforge.training.checkpoint import Progress as RunProgress
    from bertforge.training.config import Recipe
    from bertforge.training.finetune import Plan

FEW_STEPS = 50
EVERY_S = 30.0  # between two lines where no bar is drawn


def _list_variants(variant: str | None) -> str | None:
    from bertforge.training.config import describe, variants

    if variant == "list":
        names = variants()
        width = max(map(len, names))
        typer.echo("\n".join(f"{name:{width}}  {describe(name)}" for name in names))
        raise typer.Exit
    return variant


Variant = Annotated[
    str | None,
    typer.Option(
        help="A recipe that comes with bertforge; `--variant list` describes them.",
        show_default="lora-r8-all",
        callback=_list_variants,
        is_eager=True,  # asked before --data is missed
    ),
]
RecipeFile = Annotated[Path | None, typer.Option(help="A recipe of your own: a TOML file.")]
Model = Annotated[
    str | None,
    typer.Option(help="Pretrained model: minilm, a folder or a Hugging Face id. Overrides the recipe's."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE ...",
        help="Change settings: --set epochs=2 lr=1e-3 lora.r=4; `--set list` names them all.",
    ),
]


def train(
    data: Annotated[
        Path | None, typer.Option(help="Folder made by `bertforge prepare`.", show_default="needed")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; made here.", show_default="needed, but for --estimate")
    ] = None,
    variant: Variant = None,
    recipe: RecipeFile = None,
    model: Model = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure for a minute what a run would cost here; train nothing.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="With --estimate: what an hour of this machine costs.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="With --estimate: write its figures as JSON too.")
    ] = None,
) -> None:
    """Fine-tune a classifier on prepared data.

    The epoch with the lowest validation loss is kept. Ctrl-C is safe: the
    same command with --resume goes on where it stopped, and ends with the
    same weights, bit for bit, as an uninterrupted run on the same device.
    `torchrun --nproc-per-node 2 -m bertforge train ...` trains one model on
    two GPUs (docs/training.md).

    Example:

        bertforge train --data data --out runs/first

    Batch, epochs and learning rates are derived from the rows, their
    lengths and the labels, and printed before training starts; --set
    changes them.

    With --estimate instead of --out: the measured time, memory and cost of
    full fine-tuning, lora-r8 and lora-r8-last-4; no run is written.
    """
    from bertforge.artifact import output_files
    from bertforge.cli.estimate import show_estimate
    from bertforge.errors import UsageError
    from bertforge.training.distributed import is_first, launched

    chosen = chosen_recipe(variant, recipe, model, settings)
    if data is None:
        raise UsageError("--data is missing; name the folder that `bertforge prepare` made: --data data")
    if estimate:
        if resume:
            raise UsageError("--estimate measures a run from its beginning; leave --resume out")
        if out is not None:
            raise UsageError("--estimate writes no run; leave --out out")
        if launched() > 1:
            raise UsageError("--estimate measures one process; start it without torchrun")
        with output_files(json_file):
            show_estimate(data, chosen, price_per_hour, json_file)
        return
    for option, given in (("--price-per-hour", price_per_hour), ("--json", json_file)):
        if given is not None:
            raise UsageError(f"{option} belongs to --estimate; add --estimate, or leave {option} out")
    if out is None:
        raise UsageError("--out is missing; name the run's folder: --out runs/first")
    manifest = run(data, out, chosen, resume=resume)
    if not is_first():
        return
    console = Terminal()
    print_result(console, manifest, out)
    console.print(f"next: bertforge evaluate {out} --data {data} --split test")


def chosen_recipe(variant: str | None, recipe: Path | None, model: str | None, settings: list[str] | None) -> Recipe:
    """The recipe that the options name; `--set list` shows its settings and ends the command."""
    from bertforge.cli.settings import show_settings
    from bertforge.errors import UsageError
    from bertforge.training.config import load_recipe

    if variant and recipe:
        raise UsageError("--variant and --recipe both name a recipe; give one of them")
    chosen = load_recipe(variant, recipe)
    chosen = replace(chosen, model=model or chosen.model)
    chosen = chosen.with_settings([setting for setting in settings or [] if setting != "list"])
    if "list" in (settings or []):
        show_settings(chosen)
        raise typer.Exit
    return chosen


def run(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    again: str = "the same command with --resume goes on",
) -> dict[str, Any]:
    """Trains and shows how far it is; an interrupt says how to go on: `again`."""
    from bertforge.manifest import RUNNING
    from bertforge.training.finetune import finetune

    console = Terminal(stderr=True)
    display = _Display(console)

    def started(plan: Plan) -> None:
        console.print(
            f"{plan.recipe.name} on {plan.recipe.model}: {plan.trainable_parameters:,} trainable parameters, "
            f"{plan.train_rows:,} train and {plan.validation_rows:,} validation rows, "
            f"{f'{plan.processes} x ' if plan.processes > 1 else ''}{plan.hardware.name}, {plan.precision}"
        )
        console.print(plan.schedule.describe(plan.train_rows, plan.mean_tokens, plan.total_steps))
        if plan.frozen:
            console.print(plan.frozen)
        if plan.probe:
            console.print(
                f"start: a linear probe of the pretrained model, {plan.probe['validation_accuracy']:.2%} of the "
                f"validation rows right, in {plan.probe['seconds']:.0f} s"
            )
        if plan.total_steps < FEW_STEPS:
            fixed = plan.recipe.epochs or plan.recipe.rows_per_step or plan.recipe.tokens_per_step
            more = "more epochs or smaller steps, as --set rows_per_step=8, make more" if fixed else "label more rows"
            console.print(f"only {plan.total_steps} steps in all, too few to learn much; {more}")
        if plan.resumed_step:
            console.print(f"resuming after step {plan.resumed_step:,} of {plan.total_steps:,}")
        display.start(plan.total_steps, plan.resumed_step)

    try:
        return finetune(data, out, recipe, resume=resume, started=started, show=display.show)
    except KeyboardInterrupt:
        display.bar.stop()
        if (out / RUNNING).is_file():
            console.print(f"stopped at a checkpoint in {out}; {again}")
        raise
    finally:
        display.bar.stop()


class _Display:
    """How far a run is: a bar on a terminal; elsewhere a line at each epoch's end and every `EVERY_S` seconds."""

    def __init__(self, console: Terminal) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.rows = self.epochs = 0
        self.said_at = 0.0

    def start(self, total_steps: int, resumed_step: int) -> None:
        """The clock runs from here."""
        self.bar.start()
        self.bar.add_task("training", total=total_steps, completed=resumed_step, figures="")
        self.said_at = time.monotonic()

    def show(self, progress: RunProgress, sequences: int, loss: float) -> None:
        """Called after every step; `loss` is NaN until there is one."""
        task = self.bar.tasks[0]
        self.rows += sequences
        rate = self.rows / task.elapsed if task.elapsed else 0.0
        known = "" if math.isnan(loss) else f"loss {loss:.4f}  "
        idle = "" if math.isnan(progress.idle) else f"  idle {progress.idle:.0%}"
        figures, epoch = f"{known}{rate:,.0f} rows/s{idle}", f"epoch {progress.epoch + 1}"
        self.bar.update(task.id, completed=progress.step, description=epoch, figures=figures)
        if self.console.is_terminal:
            return
        if progress.epoch > self.epochs:
            self.epochs = progress.epoch
            self.console.print(_epoch_line(next(p for p in reversed(progress.history) if "epoch" in p)))
        elif time.monotonic() - self.said_at > EVERY_S:
            self.console.print(f"{epoch}, step {progress.step:,} of {task.total:,.0f}: {figures}")
        else:
            return
        self.said_at = time.monotonic()


def _epoch_line(point: dict[str, Any]) -> str:
    return (
        f"epoch {point['epoch']}: train loss {point['epoch/train_loss']:.4f}, "
        f"validation loss {point['epoch/validation_loss']:.4f}, calibrated {point['epoch/calibrated_loss']:.4f}, "
        f"accuracy {point['epoch/validation_accuracy']:.2%}"
    )


def print_result(console: Terminal, manifest: dict[str, Any], out: Path) -> None:
    """The epochs as a short table, how the model stands beside the baselines, and what was written."""
    from bertforge.cli.standing import print_standing

    metrics = manifest["metrics"]
    for point in manifest["history"]:
        if "epoch" in point:
            best = "  <- kept" if point["epoch"] == metrics["best_epoch"] else ""
            console.print(f"{_epoch_line(point)}{best}")
    print_standing(console, manifest)
    curves = [str(path) for path in (out / "metrics.jsonl", out / "tensorboard") if path.exists()]
    console.print(
        f"wrote {out} ({metrics['seconds']:.0f} s, {metrics['questions_per_s']:,.0f} rows/s, "
        f"idle {metrics['idle']:.0%}; curves in {' and '.join(curves)})"
    )
