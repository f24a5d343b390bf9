"""The results of checks."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Whether something works, works with a limitation, or does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was checked.
        status: its status.
        message: the result.
        remedy: what the user can do; empty if nothing is wrong.
    """

    subject: str
    status: Status
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.subject}: {self.message}" + (f" -> {self.remedy}" if self.remedy else "")
