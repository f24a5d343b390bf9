"""``qvlm doctor``: is everything here that an evaluation needs?"""

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
        typer.Option(help="Checkpoint folder or hub id, to compare memory and disk with; only small files are read."),
    ] = None,
    scheme: OneScheme = "w4a4",
    method: Annotated[
        str | None, typer.Option(help="Method whose search to compute the peak memory of, with --pretrained.")
    ] = None,
    option: MethodOptions = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples of that search.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of its longest sample, picture included.")] = 600,
    revision: Revision = None,
    topology: Topology = "described",
    tasks: Annotated[
        str, typer.Option(help="Tasks whose data to look for, separated by commas.")
    ] = "scienceqa,vizwiz_vqa_val,vqav2_val",
    data: Annotated[
        Path | None, typer.Option(help="Working directory of the evaluation, where local mirrors are looked up.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look for what would stop an evaluation, then try one: one line for each thing, with the remedy.

    The trial is a real run of lmms-eval on two documents with a tiny quantized model of random weights, offline and in
    a temporary folder. Exits with 1 if something fails; warnings are about what some runs do without.

    Example: qvlm doctor --pretrained llava-hf/llava-1.5-7b-hf --method qvlm --scheme w4a4
    """
    from qvlm_plugin.doctor.examine import examine
    from qvlm_plugin.doctor.finding import Status
    from qvlm_plugin.plan_request import check_request
    from qvlm_plugin.scheme import Scheme
    from qvlm_plugin.tracing.trace import check_topology

    if (method and pretrained is None) or (option and method is None):
        raise QVLMError("--method goes with --pretrained, and --option with --method")
    check_topology(topology)
    opening = pretrained and {"pretrained": pretrained, "revision": revision, "topology": topology}
    trial = "evaluating two documents with a tiny model, about half a minute"
    names = [name for name in tasks.split(",") if name]
    checks = (
        ("packages", "looking at packages", "qvlm_plugin.doctor.packages:check_packages"),
        ("bfloat16", "looking at the processor", "qvlm_plugin.doctor.arithmetic:check_arithmetic"),
        ("plugins", "looking at plugins", "qvlm_plugin.doctor.plugins:check_plugins"),
        ("lmms-eval", "looking at lmms-eval", "qvlm_plugin.harness.checks:check_registration"),
        ("tasks", "looking for tasks and their data", "qvlm_plugin.harness.checks:check_tasks", names),
        ("kernels", "testing kernels", "qvlm_plugin.doctor.kernels:check_kernels"),
        ("space", "looking at memory and disk", "qvlm_plugin.doctor.space:check_space", opening, Scheme.parse(scheme)),
        ("trial run", trial, "qvlm_plugin.doctor.trial:check_trial"),
    )
    if method is not None:
        search = (opening, check_request(method, scheme, pairs(option)), samples, tokens)
        check = "qvlm_plugin.doctor.search_memory:check_search_memory"
        checks = (*checks[:-1], ("search memory", "computing the memory of a search", check, *search), checks[-1])
    findings = []
    with working_in(data):
        for subject, doing, check, *arguments in checks:
            with _telling(doing):
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
def _telling(doing: str) -> Iterator[None]:
    """While active, a terminal shows what is being done; a log gets a line."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{doing} …"):
            yield
    else:
        typer.echo(f"{doing} …", err=True)
        yield
