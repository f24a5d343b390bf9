"""``qvlm doctor``: is everything here that an evaluation needs?"""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qvlm_plugin.commands.shared import OneScheme, Revision, reports_errors, working_in


@reports_errors
def doctor(
    pretrained: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id, to compare memory and disk with; only small files are read."),
    ] = None,
    scheme: OneScheme = "w4a4",
    revision: Revision = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks whose data to look for, separated by commas.")
    ] = "scienceqa,vizwiz_vqa_val,vqav2_val",
    data: Annotated[
        Path | None, typer.Option(help="Working directory of the evaluation, where local mirrors are looked up.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look for what would stop an evaluation: one line for each thing, with the remedy.

    Exits with 1 if something fails; warnings are about what some runs do without.

    Example: qvlm doctor --pretrained llava-hf/llava-1.5-7b-hf --scheme w4a4
    """
    from qvlm_plugin.doctor.finding import Status, examine
    from qvlm_plugin.scheme import Scheme

    widths = Scheme.parse(scheme)
    with working_in(data):
        findings = [
            *examine("packages", "qvlm_plugin.doctor.packages:check_packages"),
            *examine("plugins", "qvlm_plugin.doctor.plugins:check_plugins"),
            *examine("lmms-eval", "qvlm_plugin.harness.checks:check_registration"),
            *examine("tasks", "qvlm_plugin.harness.checks:check_tasks", tasks.split(",")),
            *examine("kernels", "qvlm_plugin.doctor.kernels:check_kernels"),
            *examine("space", "qvlm_plugin.doctor.space:check_space", pretrained, revision, widths),
        ]
    if json:
        typer.echo(json_format.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        typer.echo("\n".join(map(str, findings)))
    if any(finding.status is Status.FAIL for finding in findings):
        raise typer.Exit(1)
