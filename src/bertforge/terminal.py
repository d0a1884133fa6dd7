"""The one door to the terminal: what a table, a file name or a library brings along is shown, and never obeyed.

A label may hold `ESC [ 2 J`, which clears the screen, or a mark that turns the text after it around (CVE-2021-42574);
`[red]` is Rich's own markup and `:x:` its own emoji. So every console of ours is a `Terminal`, which writes controls as
Python does (`\\x1b`) and reads no markup. Line ends and tabs stay, for messages are made of them. Files are written as
they are.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from bertforge.errors import ArtifactError, BertforgeError, MachineError, is_out_of_memory

# C0 and C1, marks and overrides of direction, separators of lines, and bytes of a file name that are no UTF-8.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# What to do where a disk is full; what writes files names them (`naming` in artifact.py).
_FULL = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some space, then run the command again")


def visible(text: str) -> str:
    """`text` with control characters as escapes: the one of Python for each."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Terminal(Console):
    """A console on standard output, or on standard error, that breaks no line and obeys no text."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string on its way to a line or a cell, before its width is taken."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever is drawn; only Rich's own controls, which hold no text, pass as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def fail(self, title: str, message: str) -> None:
        """An error in one line."""
        self.print(title, style="bold red", end=" ")
        self.print(message.replace("\n", "\\n"))

    def tell(self, error: Exception) -> int:
        """What went wrong, in one line, or two for a defect of ours; returns the exit code."""
        if isinstance(error, BertforgeError):
            self.fail("error:", str(error))
            return error.exit_code
        if isinstance(error, OSError):
            path = error.filename2 or error.filename or ("standard output" if error.errno in _FULL else "")
            reason = (error.strerror or str(error)) + _FULL.get(error.errno or 0, "")
            self.fail("error:", f"{path}: {reason}" if path else reason)
            return ArtifactError.exit_code
        if is_out_of_memory(error):
            self.fail(
                "error:",
                "the memory is full; end what else uses it, or where you train, lower tokens_per_step: "
                "--set tokens_per_step=2048",
            )
            return MachineError.exit_code
        self.fail("internal error:", f"{type(error).__name__}: {error}")
        self.print("This is a defect of bertforge; run `bertforge --debug ...` for the traceback.")
        return 1


class VisibleFormatter(logging.Formatter):
    """The same for what is logged."""

    def format(self, record: logging.LogRecord) -> str:
        """Standard."""
        return visible(super().format(record))
