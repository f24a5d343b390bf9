"""Report every error of the ``qvlm`` command in one line."""

import errno
import os
import traceback
from pathlib import Path
from typing import Any

import typer

from qvlm_plugin.commands.groups import CommandGroup
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line

SWITCH = "QVLM_TRACEBACK"
"""Environment variable that turns tracebacks on."""

RESUMING = ("search", "compare", "ablate", "demo")
"""Commands that resume after an interrupt."""

_PACKAGE = Path(__file__).parents[1]


class OneLineErrors(CommandGroup):
    """Commands that report every exception in one line on stderr.

    The exit status is 2 for a `QVLMError`, which the user can fix, 1 for an unexpected exception, and 130 for an
    interrupt, as in a shell.
    """

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            resumes = "; the same command resumes" if ctx.invoked_subcommand in RESUMING else ""
            typer.echo(f"interrupted{resumes}", err=True)
            raise typer.Exit(130) from error
        except Exception as error:
            if _is_for_typer(error):
                raise
            if os.environ.get(SWITCH):
                traceback.print_exception(error)
            expected = isinstance(error, QVLMError)
            typer.echo(f"error: {error if expected else _unexpected(error)}", err=True)
            raise typer.Exit(2 if expected else 1) from error


def _is_for_typer(error: Exception) -> bool:
    """Whether it is typer's or click's own exception, or a closed pipe, as by ``| head``."""
    own = type(error).__module__.partition(".")[0] in ("typer", "click")
    return own or (isinstance(error, OSError) and error.errno == errno.EPIPE)


def _unexpected(error: Exception) -> str:
    """The exception's message, its notes, the line of this package that raised it, and how to see the traceback."""
    kind, message = type(error).__name__, one_line(error)
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE) and frame.filename != __file__
    ]
    details = [" ".join(note.split()) for note in getattr(error, "__notes__", ())]
    details += [f"{Path(ours[-1].filename).relative_to(_PACKAGE.parent)}, line {ours[-1].lineno}"] if ours else []
    text = kind if message == kind else f"{kind}: {message}"
    return f"{text} ({'; '.join(details)}); set {SWITCH}=1 to see the traceback"
