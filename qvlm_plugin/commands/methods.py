"""``qvlm methods``: what there is to choose from."""

from rich.console import Console
from rich.table import Table


def methods() -> None:
    """List the quantization methods and their options.

    Example: qvlm methods
    """
    from qvlm_plugin import plugins

    table = Table("method", "what it does", "options (default)")
    for name, method in sorted(plugins.methods().items()):
        options = [f"{key} ({field.default})" for key, field in method.options.model_fields.items()]
        table.add_row(name, method.summary, "\n".join(options) or "-")
    Console().print(table)
