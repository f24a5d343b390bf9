"""Whether the hooks of other packages' plugins work."""

import logging

from qvlm_plugin import backends, plugins
from qvlm_plugin.doctor.finding import Finding, Status


def check_plugins() -> list[Finding]:
    """One finding for all methods and kernels that plugins provide, and one for each warning about a plugin."""
    warnings = _LoggedWarnings()
    plugins.logger.addHandler(warnings)
    try:
        methods, kernels = plugins.methods(), backends.all_kernels()
    finally:
        plugins.logger.removeHandler(warnings)
    message = f"methods {', '.join(sorted(methods))}; kernels {', '.join(sorted(kernels))}"
    remedy = "repair or uninstall that package"
    return [
        Finding("plugins", Status.OK, message),
        *(Finding("plugins", Status.WARN, text, remedy) for text in warnings.texts),
    ]


class _LoggedWarnings(logging.Handler):
    """Collects logged messages."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
