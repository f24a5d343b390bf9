"""Find the package that caused a traceback, and the version to install instead."""

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qvlm_plugin.doctor.packages import install_command, is_met, requirement_of, version_of

LOCK = "requirements.lock in the repository lists versions that work together: pip install -r requirements.lock"

_START = "Traceback (most recent call last):"
_CAUSE = "The above exception was the direct cause of the following exception:"
_CRASH = "Fatal Python error: "
_FRAME = re.compile(r'  File "(.+)", line \d+')
_LACKING = re.compile(
    r"No module named '?([\w.]+)'?|cannot import name .* from .*?'([\w.]+)'|module '([\w.]+)' has no attribute"
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_OURS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """The cause of a failure.

    Attributes:
        error: the last line of the error.
        package: the distribution at fault; None if unknown.
    """

    error: str
    package: str | None = None

    def __str__(self) -> str:
        if self.package is None:
            return self.error
        version = version_of(self.package)
        return f"{self.error} ({self.package} {version or 'is not installed'})"

    @property
    def remedy(self) -> str:
        """Install an allowed version of the package; if it is allowed already, install the locked versions."""
        requirement = requirement_of(self.package) if self.package else None
        return LOCK if requirement is None or is_met(requirement) else install_command([requirement])


def read_fault(text: str) -> Fault:
    """The fault in a traceback, or in the last traceback of a log.

    At fault is the package that lacks an imported name, else the one that raised the error; in a chain of causes, the
    first error decides.
    """
    lines = [line for line in _COLOR.sub("", text).splitlines() if line.strip()] or ["nothing was printed"]
    starts = [index for index, line in enumerate(lines) if line == _START or line.startswith(_CRASH)]
    if not starts:
        return Fault(f"it stopped without a traceback; the last line is: {_short(lines[-1])}", _lacking(lines[-1]))
    if lines[starts[-1]] != _START:
        return Fault(_short(lines[starts[-1]]))
    last = _read_traceback(lines, starts.pop())
    first = last
    while starts and lines[first.start - 1] == _CAUSE:
        first = _read_traceback(lines, starts.pop())
    error = _short(last.error) if first is last else f"{_short(last.error)} Cause: {_short(first.error)}"
    return Fault(error, _lacking(first.error) or _raising(first.files))


@dataclass(frozen=True)
class _Traceback:
    """The number of its first line, the files of its frames (innermost last), and its last line."""

    start: int
    files: tuple[str, ...]
    error: str


def _read_traceback(lines: Sequence[str], start: int) -> _Traceback:
    inside = list(itertools.takewhile(lambda line: line[0].isspace(), lines[start + 1 :]))
    end = min(start + 1 + len(inside), len(lines) - 1)
    return _Traceback(start, tuple(match[1] for match in map(_FRAME.match, inside) if match), lines[end])


def _lacking(error: str) -> str | None:
    """The distribution that lacks the missing name of an error, or is missing itself."""
    match = _LACKING.search(error)
    if match is None:
        return None
    module, _, _ = match[match.lastindex].partition(".")
    return _distribution(module) or (module if requirement_of(module) else None)


def _raising(files: Sequence[str]) -> str | None:
    """The distribution of the innermost frame outside the standard library; None if that is this package."""
    for file in map(Path, reversed(files)):
        if file.is_relative_to(_OURS):
            return None
        folders = [folder for folder in sys.path if folder and file.is_relative_to(folder)]
        if folders:
            module = file.relative_to(max(folders, key=len)).parts[0].removesuffix(".py")
            if distribution := _distribution(module):
                return distribution
    return None


def _distribution(module: str) -> str | None:
    """The distribution of a top-level module; None for the standard library, and if several share it."""
    names = set(metadata.packages_distributions().get(module, ()))
    return names.pop() if len(names) == 1 else None


def _short(line: str) -> str:
    return " ".join(line.split())[:300]
