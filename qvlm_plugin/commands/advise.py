"""``qvlm advise``: choose a scheme from results."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qvlm_plugin.commands.shared import AsJSON, Markdown, needs_report_packages, parse_size, print_grid
from qvlm_plugin.errors import QVLMError


def advise(
    paths: Annotated[list[Path], typer.Argument(help="Results files of lmms-eval, or folders that contain them.")],
    memory: Annotated[
        str | None, typer.Option(help="Largest size of the weights, such as 4GB; default: no limit.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest accepted drop from full precision, in points for metrics in percent.")
    ] = 1.0,
    metric: Annotated[str, typer.Option(help="Metric to compare.")] = "exact_match",
    markdown: Markdown = False,
    as_json: AsJSON = False,
) -> None:
    """Recommend a method and scheme for a memory budget, as far as the results decide it.

    Compares each method and scheme with full precision of the same checkpoint over the same documents. A choice is
    recommended if the 95 % interval of its difference excludes drops above the tolerance, "loses more" if the whole
    interval is beyond the tolerance, and else undecided. Needs runs with lmms-eval's --log_samples, one of them with
    method=none. Speed is shown for packed runs only.

    Example: qvlm advise results/ --memory 4GB
    """
    budget = None if memory is None else parse_size(memory, "--memory")
    with needs_report_packages():
        from qvlm_plugin.report.advice import advice, choices_grid, find_choices, notes
    from qvlm_plugin.report.samples import read_samples

    runs = [run for path in paths for run in read_samples(path)]
    runs = [*{run.file.resolve(): run for run in runs}.values()]
    choices, problems = find_choices(runs, metric)
    for line in problems:
        typer.echo(line, err=True)
    if not choices:
        raise QVLMError("no quantized run can be compared with full precision (method=none) of the same checkpoint")
    models = list(dict.fromkeys(choice.model for choice in choices))
    sentences = {
        name: advice([choice for choice in choices if choice.model == name], budget, tolerance) for name in models
    }
    if as_json:
        rows = [choice.row(tolerance) for choice in choices]
        typer.echo(json.dumps({"choices": rows, "advice": sentences}, indent=1, allow_nan=False))
        return
    for name in models:
        own = [choice for choice in choices if choice.model == name]
        if len(models) > 1:
            typer.echo(f"{name}:\n")
        print_grid(choices_grid(own, tolerance), markdown)
        typer.echo("\n" + "\n".join(f"- {line}" for line in [*sentences[name], *notes(own)]) + "\n")
