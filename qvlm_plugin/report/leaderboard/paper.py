"""The tables of the Q-VLM paper as data. They are shown as "reported", separate from measured rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from qvlm_plugin.report.results import Grid


@dataclass(frozen=True)
class ReportedTable:
    """A table of the paper.

    Attributes:
        number: its number in the paper.
        title: our own short title.
        note: units and caveats.
        benchmarks: substrings of the names of lmms-eval's tasks that it covers.
        columns, rows: its cells, numbers as numbers.
    """

    number: int
    title: str
    note: str
    benchmarks: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]

    @property
    def grid(self) -> Grid:
        """The table as text, with as many decimals as the paper prints."""
        decimals = [max(1, *map(_decimals, column)) for column in zip(*self.rows, strict=True)]
        texts = [
            tuple(
                value if isinstance(value, str) else f"{value:.{places}f}"
                for value, places in zip(row, decimals, strict=True)
            )
            for row in self.rows
        ]
        return Grid(self.columns, tuple(texts))


def paper_source() -> str:
    """Title, authors and venue of the paper."""
    return _content()["source"]


def paper_tables(tasks: Sequence[str]) -> list[ReportedTable]:
    """The tables that cover at least one of the tasks."""
    tables = [
        ReportedTable(
            number=table["table"],
            title=table["title"],
            note=table["note"],
            benchmarks=tuple(table["tasks"]),
            columns=tuple(table["columns"]),
            rows=tuple(tuple(row) for row in table["rows"]),
        )
        for table in _content()["tables"]
    ]
    return [table for table in tables if any(name in task for name in table.benchmarks for task in tasks)]


def _content() -> dict:
    return json.loads(files(__package__).joinpath("paper.json").read_text(encoding="utf-8"))


def _decimals(value: str | float) -> int:
    return 0 if isinstance(value, str) else len(str(value).partition(".")[2])
