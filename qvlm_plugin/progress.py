"""Progress of long work: a bar on a terminal, a line now and then where the output is a file or a pipe."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Item = TypeVar("Item")

LINE_EVERY = 30.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """How far some work is, on stderr; `advance` tells it. It is a context manager.

    Attributes:
        description: what is being done.
        total: steps in all; None while that is unknown.
        done: steps so far.
    """

    def __init__(self, description: str, total: int | None = None, shown: bool = True) -> None:
        """Not shown at all where ``shown`` is false, for all processes but one."""
        self.description, self.total, self.done = description, total, 0
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console, disable=not (shown and console.is_terminal))
        self._bar = self._bars.add_task(description, total=total)
        self._lines = console if shown and not console.is_terminal else None
        self._start = self._told = time.monotonic()

    def __enter__(self) -> Self:
        """Begin to show it."""
        self._bars.start()
        self._start = self._told = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the end."""
        self._bars.stop()
        self._tell()

    def advance(self, steps: int = 1) -> None:
        """So many steps more are done."""
        self.done += steps
        self._bars.update(self._bar, completed=self.done)
        if time.monotonic() - self._told >= LINE_EVERY:
            self._tell()

    def describe(self, description: str, total: int | None = None) -> None:
        """Say something else from here on; ``total`` where it is known now."""
        self.description, self.total = description, total or self.total
        self._bars.update(self._bar, description=description, total=self.total)

    def _tell(self) -> None:
        if self._lines is not None:
            self._told = time.monotonic()
            done = f"{self.done} of {self.total}" if self.total else str(self.done)
            line = f"{self.description}: {done}, {duration(self._told - self._start)}"
            self._lines.print(line, markup=False, highlight=False, soft_wrap=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items one by one, with progress; ``total`` where ``len(items)`` does not tell."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(description, total) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """A time as people say it: "8 s", "3 min 5 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
