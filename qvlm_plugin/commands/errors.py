"""Errors of the ``qvlm`` command are one line, whatever they are."""

import errno
import os
import traceback
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line

SWITCH = "QVLM_TRACEBACK"
"""The environment variable that shows tracebacks."""

RESUMING = ("search", "compare", "ablate", "demo")
"""Commands that find what they had finished before an interrupt."""

_PACKAGE = Path(__file__).parents[1]


class OneLineErrors(TyperGroup):
    """Commands that report every exception in one line on stderr.

    The status is 2 for a `QVLMError`, which the user can mend, 1 for what nobody expected, and 130 where the user
    interrupted, as in a shell.
    """

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command that was asked for."""
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
    """Whether it is an exception of its own, or of click's; or a pipe that was closed, as by ``| head``."""
    ends = type(error).__module__.partition(".")[0] in ("typer", "click")
    return ends or (isinstance(error, OSError) and error.errno == errno.EPIPE)


def _unexpected(error: Exception) -> str:
    """What it says, what it was about (its notes), where in this package it came from, and how to see more."""
    kind, said = type(error).__name__, one_line(error)
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE) and frame.filename != __file__
    ]
    places = [" ".join(note.split()) for note in getattr(error, "__notes__", ())]
    places += [f"{Path(ours[-1].filename).relative_to(_PACKAGE.parent)}, line {ours[-1].lineno}"] if ours else []
    what = kind if said == kind else f"{kind}: {said}"
    return f"{what} ({'; '.join(places)}); {SWITCH}=1 in the environment shows the traceback"
