"""The ``qvlm`` command. Commands import torch only when they run, so that ``--help`` answers at once."""

from typing import Annotated

import typer

from qvlm_plugin import __version__
from qvlm_plugin.commands import ablate, demo, leaderboard
from qvlm_plugin.commands.advise import advise
from qvlm_plugin.commands.arguments import arguments
from qvlm_plugin.commands.compare import compare
from qvlm_plugin.commands.convert import convert
from qvlm_plugin.commands.doctor import doctor
from qvlm_plugin.commands.errors import OneLineErrors
from qvlm_plugin.commands.export import export
from qvlm_plugin.commands.inspect import inspect
from qvlm_plugin.commands.methods import methods
from qvlm_plugin.commands.plot import plot
from qvlm_plugin.commands.publish import check_submission, publish
from qvlm_plugin.commands.results import paired, results
from qvlm_plugin.commands.search import search
from qvlm_plugin.commands.trace import trace

app = typer.Typer(
    cls=OneLineErrors,
    help="Q-VLM post-training quantization of vision-language models for lmms-eval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    doctor, methods, arguments, search, inspect, plot, export, convert, trace, compare, results, paired, advise,
    publish, check_submission,
):  # fmt: skip
    app.command()(command)
for name, group in (("leaderboard", leaderboard.app), ("ablate", ablate.app), ("demo", demo.app)):
    app.add_typer(group, name=name)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Q-VLM post-training quantization of vision-language models for lmms-eval."""
