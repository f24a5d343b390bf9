"""``qvlm methods``: list the methods and their options."""

from rich.console import Console
from rich.table import Table


def methods() -> None:
    """List the quantization methods, which are presets, and the options that all of them accept.

    Example: qvlm methods
    """
    from qvlm_plugin import plugins
    from qvlm_plugin.methods.base import option_text
    from qvlm_plugin.methods.options import MethodOptions

    console, presets = Console(), Table("method", "description", "defaults", title="Methods")
    for name, method in sorted(plugins.methods().items()):
        differing, own = method.preset()
        defaults = differing | {key: method.options.model_fields[key].default for key in own}
        presets.add_row(
            name, method.summary, "\n".join(f"{key}={option_text(value)}" for key, value in defaults.items()) or "-"
        )
    console.print(presets)
    options = Table("option", "default", title="Options of every method but none; meanings: qvlm arguments")
    for name, field in MethodOptions.model_fields.items():
        options.add_row(name, option_text(field.default))
    console.print(options)
