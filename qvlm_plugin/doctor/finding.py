"""What a check finds."""

from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module


class Status(StrEnum):
    """Whether something works, works with a limitation, or does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        status: how it is.
        message: what was found.
        remedy: what to do about it; empty where nothing need be done.
    """

    subject: str
    status: Status
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.subject}: {self.message}" + (f" -> {self.remedy}" if self.remedy else "")


def examine(subject: str, check: str, *arguments: object) -> list[Finding]:
    """What a check finds, which ``check`` names as ``module:function``.

    That it cannot even be imported, or raises, is a finding too: a broken installation can do anything.
    """
    module, _, function = check.partition(":")
    try:
        return getattr(import_module(module), function)(*arguments)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return [Finding(subject, Status.FAIL, f"{type(error).__name__}: {reason}", "mend what this says, then repeat")]
