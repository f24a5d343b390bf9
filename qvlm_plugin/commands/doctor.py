"""``qvlm doctor``: check that everything that an evaluation needs is installed and works."""

import json as json_format
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qvlm_plugin.commands.shared import MethodOptions, OneScheme, Revision, Topology, pairs, working_in
from qvlm_plugin.errors import QVLMError


def doctor(
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder or hub id whose memory and disk space to compute; reads only small files."
        ),
    ] = None,
    scheme: OneScheme = "w4a4",
    method: Annotated[
        str | None, typer.Option(help="Also compute the peak memory of a search with this method; needs --pretrained.")
    ] = None,
    option: MethodOptions = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration samples of that search.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Length of its longest sample in tokens, image included.")] = 600,
    revision: Revision = None,
    topology: Topology = "described",
    tasks: Annotated[
        str, typer.Option(help="Tasks whose data to check, separated by commas.")
    ] = "scienceqa,vizwiz_vqa_val,vqav2_val",
    data: Annotated[
        Path | None,
        typer.Option(help="Working directory of the evaluation: local copies of data sets are looked up in it."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check everything that an evaluation needs and run a small one; prints a line for each check, with a remedy.

    The trial is a real run of lmms-eval on two documents with a tiny quantized model of random weights, offline and in
    a temporary folder. Exits with 1 if a check fails; a warning concerns only some runs.

    Example: qvlm doctor --pretrained llava-hf/llava-1.5-7b-hf --method qvlm --scheme w4a4
    """
    from qvlm_plugin.doctor.examine import examine
    from qvlm_plugin.doctor.finding import Status
    from qvlm_plugin.plan_request import check_request
    from qvlm_plugin.scheme import Scheme
    from qvlm_plugin.tracing.trace import check_topology

    if (method and pretrained is None) or (option and method is None):
        raise QVLMError("--method needs --pretrained, and --option needs --method")
    check_topology(topology)
    opening = pretrained and {"pretrained": pretrained, "revision": revision, "topology": topology}
    trial = "evaluating two documents with a tiny model, about half a minute"
    names = [name for name in tasks.split(",") if name]
    checks = (
        ("packages", "checking packages", "qvlm_plugin.doctor.packages:check_packages"),
        ("bfloat16", "checking the processor", "qvlm_plugin.doctor.arithmetic:check_arithmetic"),
        ("plugins", "checking plugins", "qvlm_plugin.doctor.plugins:check_plugins"),
        ("lmms-eval", "checking lmms-eval", "qvlm_plugin.harness.checks:check_registration"),
        ("tasks", "checking tasks and their data", "qvlm_plugin.harness.checks:check_tasks", names),
        ("kernels", "testing kernels", "qvlm_plugin.doctor.kernels:check_kernels"),
        ("space", "checking memory and disk", "qvlm_plugin.doctor.space:check_space", opening, Scheme.parse(scheme)),
        ("trial run", trial, "qvlm_plugin.doctor.trial:check_trial"),
    )
    if method is not None:
        search = (opening, check_request(method, scheme, pairs(option)), samples, tokens)
        check = "qvlm_plugin.doctor.search_memory:check_search_memory"
        checks = (*checks[:-1], ("search memory", "computing the memory of a search", check, *search), checks[-1])
    findings = []
    with working_in(data):
        for subject, activity, check, *arguments in checks:
            with _showing(activity):
                found = examine(subject, check, *arguments)
            findings += found
            if not json:
                for finding in found:
                    typer.echo(finding)
    if json:
        typer.echo(json_format.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.status is Status.FAIL for finding in findings):
        raise typer.Exit(1)


@contextmanager
def _showing(activity: str) -> Iterator[None]:
    """Shows the activity on a terminal while its body runs; elsewhere prints a line."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{activity} …"):
            yield
    else:
        typer.echo(f"{activity} …", err=True)
        yield
