"""Run one check, whatever state the installation is in."""

import traceback
from importlib import import_module

from qvlm_plugin.doctor.fault import read_fault
from qvlm_plugin.doctor.finding import Finding, Status


def examine(subject: str, check: str, *arguments: object) -> list[Finding]:
    """What a check finds, which ``check`` names as ``module:function``.

    That it cannot even be imported, or raises, is a finding too: a broken installation can do anything.
    """
    module, _, function = check.partition(":")
    try:
        return getattr(import_module(module), function)(*arguments)
    except Exception:
        fault = read_fault(traceback.format_exc())
        return [Finding(subject, Status.FAIL, str(fault), fault.remedy)]
