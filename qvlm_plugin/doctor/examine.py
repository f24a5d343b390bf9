"""Run one check, even in a broken installation."""

import traceback
from importlib import import_module

from qvlm_plugin.doctor.fault import read_fault
from qvlm_plugin.doctor.finding import Finding, Status


def examine(subject: str, check: str, *arguments: object) -> list[Finding]:
    """The findings of the check ``module:function``.

    If the check cannot be imported, or raises, as in a broken installation, that is the finding.
    """
    module, _, function = check.partition(":")
    try:
        return getattr(import_module(module), function)(*arguments)
    except Exception:
        fault = read_fault(traceback.format_exc())
        return [Finding(subject, Status.FAIL, str(fault), fault.remedy)]
