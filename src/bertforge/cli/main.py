"""The table of subcommands, and the one place where an error becomes a line on stderr and an exit code.

Every command lives in a module of this package and imports the heavy libraries inside its function, so `--help`
answers at once.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bertforge import __version__, threads
from bertforge.cli import (
    check,
    cross_validate,
    data,
    demo,
    doctor,
    engines,
    fit,
    infer,
    quantize,
    sample,
    serve,
    threshold,
    train,
    triton_repository,
)
from bertforge.terminal import Terminal, VisibleFormatter, visible


class _Commands(TyperGroup):
    """Runs a command and turns what it raises into one line and an exit code (listed in `bertforge.errors`)."""

    def invoke(self, ctx: Any) -> Any:
        stderr = Terminal(stderr=True)
        debug: bool = ctx.params["debug"]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stderr.print("interrupted")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):  # the last: `bertforge ... | head`
            raise
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):  # a usage error: typer prints it itself
                error.message = visible(error.message)  # type: ignore[attr-defined]
                raise
            if debug:
                raise
            raise typer.Exit(stderr.tell(error)) from None


app = typer.Typer(
    name="bertforge",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune BERT on text and optional columns, then compile it for fast inference.",
    epilog="Start with `bertforge demo`, or `bertforge fit TABLE --label-column NAME` on a table of your own.",
)
# In the order in which a user meets them.
app.command("demo")(demo.demo)
app.command("fit")(fit.fit)
app.command("doctor")(doctor.doctor)
app.command("sample-data")(sample.sample_data)
app.command("prepare")(data.prepare)
app.command("train")(train.train)
app.command("cross-validate")(cross_validate.cross_validate)
app.command("evaluate")(infer.evaluate)
app.command("threshold")(threshold.threshold)
app.command("predict")(infer.predict)
app.command("merge")(infer.merge)
app.command("quantize")(quantize.quantize)
app.command("compile")(engines.compile_)
app.command("benchmark")(engines.benchmark)
app.command("serve")(serve.serve)
app.command("export-triton")(triton_repository.export_triton)
app.command("check")(check.check)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bertforge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    count: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            help="Threads on the CPU, for every library; OMP_NUM_THREADS sets it too.",
            show_default="the cores this process may use",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    threads.set_environment(count)  # no command has imported torch yet


def main() -> None:
    """The console script."""
    log = logging.StreamHandler()
    log.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(handlers=[log])
    app(_normalised(sys.argv[1:]), prog_name="bertforge")  # the name also where `python -m` starts it


def _normalised(arguments: list[str]) -> list[str]:
    """`--debug` and `--threads N` may follow the command's name, and `--set a=1 b=2` means `--set a=1 --set b=2`."""
    normalised: list[str] = []
    given: list[str] = []
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        everywhere = argument in ("--debug", "--threads") or argument.startswith("--threads=") or before == "--threads"
        (normalised if everywhere else given).append(argument)
    setting = False
    for argument in given:
        another = setting and ("=" in argument or argument == "list")
        if another and not argument.startswith("-") and normalised[-1] != "--set":
            normalised.append("--set")
        setting = argument == "--set" or another
        normalised.append(argument)
    return normalised
