"""Progress of long work: a bar on a terminal, a line every half minute if the output is a file or a pipe."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Item = TypeVar("Item")

LINE_EVERY = 30.0
"""Seconds between lines if the output is not a terminal."""


class Progress:
    """A progress display on stderr, as a context manager.

    Attributes:
        description: description of the work.
        total: number of steps; None while it is unknown.
        done: number of steps done so far.
    """

    def __init__(self, description: str, total: int | None = None, shown: bool = True) -> None:
        """Create the display; nothing is displayed if ``shown`` is false, as in all processes but the first."""
        self.description, self.total, self.done = description, total, 0
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console, disable=not (shown and console.is_terminal))
        self._bar = self._bars.add_task(description, total=total)
        self._lines = console if shown and not console.is_terminal else None
        self._start = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        """Start the display."""
        self._bars.start()
        self._start = self._printed = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the display, with a last line."""
        self._bars.stop()
        self._print_line()

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more steps as done."""
        self.done += steps
        self._bars.update(self._bar, completed=self.done)
        if time.monotonic() - self._printed >= LINE_EVERY:
            self._print_line()

    def describe(self, description: str, total: int | None = None) -> None:
        """Change the description and, if it has become known, the total."""
        self.description, self.total = description, total or self.total
        self._bars.update(self._bar, description=description, total=self.total)

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _print_line(self) -> None:
        if self._lines is not None:
            self._printed = time.monotonic()
            done = f"{self.done} of {self.total}" if self.total else str(self.done)
            line = f"{self.description}: {done}, {duration(self._printed - self._start)}"
            self._lines.print(line, markup=False, highlight=False, soft_wrap=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items one by one, with a progress display; ``total`` is needed if ``items`` have no length."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(description, total) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """A time in readable units: "8 s", "3 min 5 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
