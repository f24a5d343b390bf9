"""Plugins of other packages: whether their hooks answer."""

import logging

from qvlm_plugin import backends, plugins
from qvlm_plugin.doctor.finding import Finding, Status


def check_plugins() -> list[Finding]:
    """One finding for what all plugins provide, and one for each complaint about a plugin."""
    complaints = _Complaints()
    plugins.logger.addHandler(complaints)
    try:
        methods, kernels = plugins.methods(), backends.all_kernels()
    finally:
        plugins.logger.removeHandler(complaints)
    message = f"methods {', '.join(sorted(methods))}; kernels {', '.join(sorted(kernels))}"
    remedy = "repair or uninstall that package"
    return [
        Finding("plugins", Status.OK, message),
        *(Finding("plugins", Status.WARN, text, remedy) for text in complaints.texts),
    ]


class _Complaints(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
