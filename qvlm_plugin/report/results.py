"""Read the results files that lmms-eval writes, and show them as one table."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from rich.table import Table

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import concerning, one_line, read_json
from qvlm_plugin.report.shares import PERCENT, scale, score_text

BYPASS = "bypass"
"""What lmms-eval writes, with a value of 999, where ``--predict_only`` left scoring out."""


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


class _Command(BaseModel):
    offset: int | None = None


class _File(BaseModel):
    """What is read of a results file."""

    results: dict[str, dict[str, Any]]
    counts: dict[str, _Counts] = Field(alias="n-samples")
    config: _Command = Field(default_factory=_Command)
    qvlm: _Run | None = None


@dataclass(frozen=True)
class Score:
    """One metric of one task in one run.

    Attributes:
        task, metric: as lmms-eval names them.
        value: over all documents; None where answers were only collected (``--predict_only``).
        stderr: its standard error; None where the harness gives none.
        documents: how many documents were evaluated; None for a group of tasks.
        limited: whether ``--limit`` or ``--offset`` left documents out.
        run: the run's ``qvlm`` provenance; None for models of other packages.
        file: the results file.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    documents: int | None
    limited: bool
    run: dict[str, Any] | None
    file: Path

    @property
    def scale(self) -> int:
        """By which tables show it, see `shares.scale`."""
        return scale(self.metric, self.value)

    def row(self) -> dict[str, Any]:
        """As JSON data; the run's facts are those that tables show."""
        run = self.run or {}
        facts = {name: run.get(name) for name in ("method", "scheme", "backend", "bits", "packed_bytes", "plan_hash")}
        own = {name: getattr(self, name) for name in ("task", "metric", "value", "stderr", "documents", "limited")}
        return {**facts, **own, "stand_in": run.get("stand_in"), "file": str(self.file)}


def read_results(paths: Sequence[Path]) -> list[Score]:
    """The scores in results files, or in all ``*_results.json`` below folders.

    Raises:
        QVLMError: a folder has no results file (lmms-eval exits with 0 even when an evaluation failed), or a file is
            not readable.
    """
    scores = []
    for file in (file for path in paths for file in _results_files(path)):
        with concerning(str(file)):
            scores += _read_file(file)
    return scores


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
            counts = read.counts.get(task)  # none of a group
            yield Score(
                task=task,
                metric=metric,
                value=None if metric == BYPASS else value,
                stderr=stderr if isinstance(stderr, int | float) and metric != BYPASS else None,
                documents=counts.effective if counts else None,
                limited=bool(read.config.offset or (counts and counts.effective != counts.original)),
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
    """The scores with standard errors, the runs in the order given; columns of shares are in percent.

    Rows are marked where the data stands in for a real data set, and where a limit left documents out.
    """
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for score in scores:
        if score.value is not None:
            values[score.task, score.metric].append(score.value)
    columns = {(task, metric): scale(metric, *values[task, metric]) for task, metric in sorted(values)}
    rows = []
    for file in dict.fromkeys(score.file for score in scores):
        with concerning(str(file)):
            own = [score for score in scores if score.file == file]
            cells = {
                (one.task, one.metric): score_text(one.value, one.stderr, columns[one.task, one.metric])
                for one in own
                if one.value is not None
            }
            run = own[0].run or {}
            head = (run.get("method", "?"), run.get("scheme", "?"), _bits(run))
            rows.append((*head, *(cells.get(column, "") for column in columns), _notes(own, run)))
    names = (f"{task} {metric}{' (%)' * (scale == PERCENT)}" for (task, metric), scale in columns.items())
    return Grid(("method", "scheme", "weight / activation bits", *names, "notes"), tuple(rows))


def _bits(run: dict[str, Any]) -> str:
    decoder = run.get("bits", {}).get("decoder")
    return f"{decoder['weight']:.2f} / {decoder['activation']:.0f}" if decoder else "?"


def _notes(row: Sequence[Score], run: dict[str, Any]) -> str:
    counts = {score.task: score.documents for score in row if score.documents is not None}
    if len(set(counts.values())) == 1:
        notes = [f"{next(iter(counts.values()))} documents per task"]
    else:
        notes = ["documents: " + ", ".join(f"{task} {count}" for task, count in counts.items())] if counts else []
    if any(score.value is None for score in row):
        notes.append("answers only, not scored")
    if run.get("stand_in"):
        notes.append("stand-in data")
    if any(score.limited for score in row):
        notes.append("limited")
    return ", ".join(notes)
