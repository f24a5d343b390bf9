"""Write a report: a table to read, its rows as data, and a figure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvlm_plugin.atomic import write_file
from qvlm_plugin.calibration import CalibrationSet, parse_sources
from qvlm_plugin.report.results import Grid

STAND_IN = "**Stand-in data**: the documents are not those of the data sets whose names they bear."


@dataclass(frozen=True)
class Report:
    """A command's results.

    Attributes:
        name: name of its files, without suffix.
        title: one line.
        command: the command line that reproduces it.
        tables: the first one stands above the figure, the others below.
        rows: the tables' content as JSON data.
        notes: sentences that explain the tables.
        figure: the figure's files by suffix.
        verdicts: conclusions, one sentence each, printed last.
        data: further JSON data by key.
    """

    name: str
    title: str
    command: str
    tables: Sequence[Grid]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    figure: Mapping[str, bytes]
    verdicts: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The whole report as a Markdown document."""
        first, *others = (table.markdown() for table in self.tables)
        notes, verdicts = ("\n".join(f"- {line}" for line in lines) for lines in (self.notes, self.verdicts))
        parts = [f"# {self.title}", first, notes, f"```console\n$ {self.command}\n```"]
        parts += [f"![{self.title}]({self.name}.svg)", *others]
        return "\n\n".join([*parts, f"## Verdict\n\n{verdicts}"] if verdicts else parts) + "\n"

    def write(self, folder: Path) -> Path:
        """Write ``<name>.md``, ``.json`` and the figure, each atomically.

        Returns:
            The Markdown file.
        """
        content = {"name": self.name, "title": self.title, "command": self.command, "notes": [*self.notes]}
        content |= {"rows": [*self.rows], **self.data} | ({"verdicts": [*self.verdicts]} if self.verdicts else {})
        data = json.dumps(content, indent=1, allow_nan=False) + "\n"
        files = {**self.figure, "json": data.encode(), "md": self.markdown().encode()}
        for suffix, blob in files.items():  # the document last: once it exists, so does all that it shows
            write_file(folder / f"{self.name}.{suffix}", blob)
        return folder / f"{self.name}.md"


def stand_in_note(samples: CalibrationSet) -> list[str]:
    """A note if the samples' folder, or a local mirror that shadows a hub data set, is marked as stand-in data."""
    files = [Path(source.location).parent for source in parse_sources(samples.source) if source.split is None]
    marked = any((folder / "stand_in.json").is_file() for folder in files)
    if len(files) < len(parse_sources(samples.source)):
        marked |= any(Path.cwd().glob("*/*/stand_in.json"))
    return [STAND_IN] if marked else []
