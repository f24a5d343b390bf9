"""``qvlm results`` and ``qvlm paired``: scores of runs, and their differences over the same documents."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qvlm_plugin.commands.shared import AsJSON, Markdown, needs_report_packages, print_grid
from qvlm_plugin.errors import QVLMError


def results(
    paths: Annotated[list[Path], typer.Argument(help="Results files of lmms-eval, or folders that contain them.")],
    markdown: Markdown = False,
    as_json: AsJSON = False,
) -> None:
    """Print one table of the scores in results files, with standard errors and precision.

    Example: qvlm results results/
    """
    from qvlm_plugin.report.results import read_results, results_grid, results_notes

    scores = read_results(paths)
    if as_json:
        typer.echo(json.dumps([score.row() for score in scores], indent=1))
        return
    print_grid(results_grid(scores), markdown)
    typer.echo("\n".join(f"- {note}" for note in results_notes(scores)))


def paired(
    baseline: Annotated[Path, typer.Argument(help="Results file of one run, or the folder that contains it.")],
    others: Annotated[
        list[Path], typer.Argument(help="Results files to compare with it, or folders that contain them.")
    ],
    metric: Annotated[str, typer.Option(help="Metric to compare.")] = "exact_match",
    markdown: Markdown = False,
    as_json: AsJSON = False,
) -> None:
    """Compare runs with a baseline over the same documents: paired differences, intervals and tests.

    Needs runs with lmms-eval's --log_samples. Prints one row for each run and task, and one for the average over tasks.
    Holm's adjustment covers all rows.

    Example: qvlm paired results/none-w16a16 results/rtn-w4a4 results/qlora-w4a4
    """
    from qvlm_plugin.report.samples import read_samples

    with needs_report_packages():
        from qvlm_plugin.report.paired import compare as compare_runs
        from qvlm_plugin.report.paired_table import paired_grid, paired_notes, paired_rows

    first, *more = read_samples(baseline)
    if more:
        raise QVLMError(f"{baseline} contains {len(more) + 1} results files; name one of them as the baseline")
    runs = {run.file.resolve(): run for path in others for run in read_samples(path)}
    runs.pop(first.file.resolve(), None)  # a folder of all runs contains the baseline too
    if not runs:
        raise QVLMError(f"there is no run to compare with the baseline {first.file}")
    rows = [row for run in runs.values() for row in compare_runs(first, run, metric)]
    if as_json:
        typer.echo(json.dumps(paired_rows(rows), indent=1))
        return
    print_grid(paired_grid(first, rows), markdown)
    typer.echo("\n" + "\n".join(f"- {note}" for note in paired_notes(first, rows, metric)))
