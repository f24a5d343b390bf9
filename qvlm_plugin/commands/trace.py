"""``qvlm trace``: describe a model family by running a model."""

from typing import Annotated

import typer

from qvlm_plugin.commands.shared import Conv, Revision
from qvlm_plugin.demo import resolve_demo


def trace(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; 'demo' is the embedded small LLaVA.")],
    revision: Revision = None,
    conv: Conv = None,
) -> None:
    """Find the parts of a model and print them as a plugin that describes its family.

    Use it for a family that this package does not know. Runs prompts with and without images through a model without
    weights, and prints a Python module (docs/add-a-family.md). With topology=traced, an evaluation does this by itself.

    Example: qvlm trace path/to/model > my_family.py
    """
    from qvlm_plugin.models.placement import empty_model
    from qvlm_plugin.tracing.source import python_source
    from qvlm_plugin.tracing.trace import open_with_topology

    checkpoint = open_with_topology(resolve_demo(model), "traced", revision=revision, conv=conv)
    typer.echo(python_source(checkpoint.topology, empty_model(checkpoint.config)), nl=False)
