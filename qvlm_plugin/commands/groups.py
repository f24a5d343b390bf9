"""Groups of commands, and how their help lists the commands."""

from typing import Any

import typer
from typer.core import TyperGroup


class CommandGroup(TyperGroup):
    """Lists each command with its whole first sentence; typer cuts it at the end of the line."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        """Write the list of commands."""
        texts = {name: self.get_command(ctx, name).help or "" for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(text.partition("\n\n")[0].split())) for name, text in texts.items()])
