"""Read the results files that lmms-eval writes, and show them as one table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from rich.table import Table

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line, read_json


class _Counts(BaseModel):
    effective: int
    original: int


class _Widths(BaseModel):
    weight: float
    activation: float


class _Run(BaseModel):
    """What is read of a run's ``qvlm``; more may be there."""

    method: str = "?"
    scheme: str = "?"
    bits: dict[str, _Widths] = Field(default_factory=dict)
    stand_in: bool = False
    search_seconds: float | None = None


class _File(BaseModel):
    """What is read of a results file."""

    results: dict[str, dict[str, Any]]
    counts: dict[str, _Counts] = Field(alias="n-samples")
    qvlm: _Run | None = None


@dataclass(frozen=True)
class Score:
    """One metric of one task in one run.

    Attributes:
        task, metric: as lmms-eval names them.
        value: the mean over documents, 0 to 1.
        stderr: its standard error; None where the harness gives none.
        documents: how many documents were evaluated.
        limited: whether ``--limit`` left documents out.
        run: the run's ``qvlm`` provenance; None for models of other packages.
        file: the results file.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    limited: bool
    run: dict[str, Any] | None
    file: Path


def read_results(paths: Sequence[Path]) -> list[Score]:
    """The scores in results files, or in all ``*_results.json`` below folders.

    Raises:
        QVLMError: a folder has no results file (lmms-eval exits with 0 even when an evaluation failed), or a file is
            not readable.
    """
    return [score for path in paths for file in _results_files(path) for score in _read_file(file)]


def _results_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.rglob("*_results.json"))
    if not files:
        raise QVLMError(f"{path} has no *_results.json: the evaluation failed, or wrote elsewhere")
    return files


def _read_file(file: Path) -> Iterator[Score]:
    try:
        content = read_json(file)
        read = _File.model_validate(content)
    except (OSError, ValueError) as error:
        raise QVLMError(f"{file} is not a results file of lmms-eval: {one_line(error)}") from error
    for task, metrics in read.results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or "_stderr" in metric or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            counts = read.counts.get(task, _Counts(effective=0, original=0))
            yield Score(
                task=task,
                metric=metric,
                value=value,
                stderr=stderr if isinstance(stderr, int | float) else None,
                documents=counts.effective,
                limited=counts.effective != counts.original,
                run=content.get("qvlm"),
                file=file,
            )


@dataclass(frozen=True)
class Grid:
    """A table of text: one row per run, one column per task and metric."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(*self.header)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def results_grid(scores: Sequence[Score]) -> Grid:
    """The scores in percent with standard errors, the runs in the order given.

    Rows are marked where the data stands in for a real data set, and where a limit left documents out.
    """
    columns = sorted({(score.task, score.metric) for score in scores})
    rows = []
    for file in dict.fromkeys(score.file for score in scores):
        own = [score for score in scores if score.file == file]
        cells = {(score.task, score.metric): _cell(score) for score in own}
        run = own[0].run or {}
        head = (run.get("method", "?"), run.get("scheme", "?"), _bits(run))
        rows.append((*head, *(cells.get(column, "") for column in columns), _notes(own, run)))
    names = (f"{task} {metric}" for task, metric in columns)
    return Grid(("method", "scheme", "weight / activation bits", *names, "notes"), tuple(rows))


def _cell(score: Score) -> str:
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    return f"{100 * score.value:.1f}{error}"


def _bits(run: dict[str, Any]) -> str:
    decoder = run.get("bits", {}).get("decoder")
    return f"{decoder['weight']:.2f} / {decoder['activation']:.0f}" if decoder else "?"


def _notes(row: Sequence[Score], run: dict[str, Any]) -> str:
    notes = [f"{min(score.documents for score in row)} documents per task"]
    if run.get("stand_in"):
        notes.append("stand-in data")
    if any(score.limited for score in row):
        notes.append("limited")
    return ", ".join(notes)
