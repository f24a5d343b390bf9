"""``qvlm advise``: which of the evaluated methods and bits to use."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qvlm_plugin.commands.shared import AsJSON, needs_report_packages


def advise(
    paths: Annotated[list[Path], typer.Argument(help="Results files of one model's runs, or folders that hold some.")],
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB that the packed model may take; default: no limit.")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, help="Points that may be lost against full precision; of scores that are no shares, in their unit."
        ),
    ] = 1.0,
    metric: Annotated[str, typer.Option(help="Metric of the tasks to compare.")] = "exact_match",
    as_json: AsJSON = False,
) -> None:
    """Print what each method and scheme loses against its size, and say which to use.

    The runs must be of one model, among them one of full precision, and made with lmms-eval's --log_samples. Runs that
    differ in their seed alone are pooled. A method is used where the 95 % interval of its difference to full precision
    lies within the tolerance: without --memory the smallest of these, with it the most accurate that fits.

    Example: qvlm advise results/ --memory 4.5 --tolerance 0.5
    """
    from qvlm_plugin.report.samples import read_samples

    with needs_report_packages():
        from qvlm_plugin.report.advice import advice_grid, advice_notes, advice_rows, advice_text, options_of

    runs = {run.file.resolve(): run for path in paths for run in read_samples(path)}
    options, limit = options_of([*runs.values()], metric, tolerance), None if memory is None else memory * 1e9
    if as_json:
        typer.echo(json.dumps(advice_rows(options, limit), indent=1))
        return
    console = Console()
    console.print(advice_grid(options).rich(console.width))
    typer.echo("\n" + "\n".join(f"- {note}" for note in advice_notes(options)))
    typer.echo(f"\n{advice_text(options, limit, tolerance)}")
