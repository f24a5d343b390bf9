"""What a check finds."""

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
