"""``qvlm inspect``: show a plan."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from qvlm_plugin.commands.shared import AsJSON


def inspect(
    directory: Annotated[Path, typer.Argument(help="A plan's folder.")],
    modules: Annotated[bool, typer.Option("--modules", help="Also list every Linear, with its formats.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Print a plan's method, options, calibration and bits.

    Example: qvlm inspect plans/qlora-w4a4 --modules
    """
    from qvlm_plugin.plan_header import read_header

    plan = read_header(directory)
    if as_json:
        content = {**plan.facts, "model": plan.model, "folds": len(plan.folds), "rotations": len(plan.rotations)}
        content |= {"modules": [module.model_dump() for module in plan.modules]} if modules else {}
        typer.echo(json.dumps(content, indent=1))
        return
    console = Console()
    facts = Table(show_header=False, box=None)
    facts.add_row("method", plan.method)
    facts.add_row("scheme", plan.scheme)
    facts.add_row("options", ", ".join(f"{name}={value}" for name, value in plan.options.items()) or "-")
    facts.add_row("plan hash", plan.hash)
    facts.add_row("model", plan.model)
    record = plan.calibration
    facts.add_row("calibration", f"{len(record.digests)} of {record.source}, seed {record.seed}" if record else "none")
    if record and record.over_context:
        facts.add_row("too long", f"{record.over_context} samples exceed the model's context")
    if stored := sum(module.weight.stored for module in plan.modules):
        facts.add_row("codes", f"for {stored} Linears")
    if plan.rotations:
        facts.add_row("rotations", f"inputs of {len(plan.rotations)} sites")
    facts.add_row("search", f"{plan.search_seconds:.1f} s")
    if uncalibrated := plan.record.get("uncalibrated"):
        facts.add_row(
            "uncalibrated", f"experts without samples, whose inputs get per-token ranges: {', '.join(uncalibrated)}"
        )
    console.print(facts)
    bits = Table("part", "Linears", "weight bits", "activation bits", title="Effective bits")
    for part, effective in plan.effective_bits().items():
        count = sum(module.part == part for module in plan.modules)
        bits.add_row(part, str(count), f"{effective['weight']:.3f}", f"{effective['activation']:.2f}")
    console.print(bits)
    if modules:
        table = Table(Column("module", overflow="fold"), "shape", "weight", "activation")
        for module in plan.modules:
            rotation = plan.rotation_of(module)
            inputs = f"{rotation}, {module.activation}" if rotation else str(module.activation)
            table.add_row(module.name, "x".join(map(str, module.shape)), str(module.weight), inputs)
        console.print(table)
