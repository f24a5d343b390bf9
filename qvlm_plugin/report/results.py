"""Read the results files that lmms-eval writes, and show them as one table."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table

from qvlm_plugin.reading import concerning
from qvlm_plugin.report.leaderboard.schema import find_results_files, main_metric, numbers, read_results_file
from qvlm_plugin.report.naming import traits
from qvlm_plugin.report.shares import FEWEST, PERCENT, Interval, scale, score_text, share_interval

BYPASS = "bypass"
"""The metric that lmms-eval writes, with a value of 999, under ``--predict_only``."""


@dataclass(frozen=True)
class Score:
    """One metric of one task in one run.

    Attributes:
        task, metric: lmms-eval's names.
        main: whether it is the task's first metric; others may cover only some documents.
        value: the score over all documents; None if answers were not scored (``--predict_only``).
        stderr: its standard error; None if the harness gives none.
        documents: number of documents evaluated; None for a group of tasks.
        limited: whether ``--limit`` or ``--offset`` left documents out.
        run: the run's ``qvlm`` provenance; None for models of other packages.
        tokens_per_second: the run's speed of generation; None if unknown, or if low bits are simulated.
        file: the results file.
    """

    task: str
    metric: str
    main: bool
    value: float | None
    stderr: float | None
    documents: int | None
    limited: bool
    run: dict[str, Any] | None
    tokens_per_second: float | None
    file: Path

    @property
    def scale(self) -> int:
        """Factor by which tables multiply it, see `shares.scale`."""
        return scale(self.metric, self.value)

    @property
    def interval(self) -> Interval | None:
        """Wilson's 95 % interval, for shares whose standard error is a poor guide; else None."""
        if self.value is None:
            return None
        return share_interval(self.metric, self.value, self.stderr, self.documents if self.main else None)

    @property
    def text(self) -> str:
        """The score for a table."""
        return "" if self.value is None else score_text(self.value, self.stderr, self.scale, self.interval)

    def row(self) -> dict[str, Any]:
        """The score as JSON data, with the facts of its run that tables show."""
        run = self.run or {}
        facts = {name: run.get(name) for name in ("method", "scheme", "backend", "bits", "packed_bytes", "plan_hash")}
        own = {name: getattr(self, name) for name in ("task", "metric", "value", "stderr", "documents", "limited")}
        low, high = self.interval or (None, None)
        own |= {"wilson_low": low, "wilson_high": high, "model": run.get("pretrained")}
        return {**facts, **own, "stand_in": run.get("stand_in"), "file": str(self.file)}


def read_results(paths: Sequence[Path]) -> list[Score]:
    """The scores in results files, and in all those below folders.

    Raises:
        QVLMError: see `find_results_files` and `read_results_file`.
    """
    scores = []
    for file in find_results_files(paths):
        with concerning(str(file)):
            scores += _read_file(file)
    return scores


def _read_file(file: Path) -> Iterator[Score]:
    _, content, read = read_results_file(file)
    for task, metrics in read.results.items():
        counts = read.counts.get(task)  # groups have none
        for metric, kind, value in numbers(metrics):
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            yield Score(
                task=task,
                metric=metric,
                main=metric == main_metric(read, task),
                value=None if metric == BYPASS else value,
                stderr=stderr if isinstance(stderr, int | float) and metric != BYPASS else None,
                documents=counts.effective if counts else None,
                limited=bool(read.config.offset or (counts and counts.effective != counts.original)),
                run=content.get("qvlm"),
                tokens_per_second=read.tokens_per_second,
                file=file,
            )


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        header, rows: texts, one for each column.
        lead: number of leading columns, which name the row.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lead: int = 1

    def rich(self, width: int) -> Group:
        """The grid for a terminal: tables no wider than ``width``, each with the columns that name the rows."""
        columns = list(zip(self.header, *self.rows, strict=True))
        lead, rest = columns[: self.lead], [_wrapped(*column) for column in columns[self.lead :]]
        words = [max(cell_len(word) for cell in column for word in (*cell.split(), "")) for column in lead]
        available = width - 1 - min(sum(size + _PADDING for size in words), width // 2)
        tables: list[list[tuple[str, ...]]] = [[]]
        left = available
        for column in rest:
            size = _column_width(column)
            if size > left and tables[-1]:
                tables.append([])
                left = available
            tables[-1].append(column)
            left -= size
        return Group(*(_table(lead, own, width) for own in tables))

    def markdown(self) -> str:
        """The grid as a Markdown table."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


_PADDING = 2
"""Spaces between columns."""


def _wrapped(heading: str, *cells: str) -> tuple[str, ...]:
    """A column wrapped as narrowly as headings allow without breaking words, and cells before their brackets."""
    size = max(map(cell_len, [*heading.split(), *(cell.partition(" (")[0] for cell in cells), " "]))
    return tuple("\n".join(wrap(text, size)) for text in (heading, *cells))


def _column_width(column: Sequence[str]) -> int:
    """Width of a column with its padding."""
    return max(cell_len(line) for cell in column for line in cell.split("\n")) + _PADDING


def _table(lead: Sequence[tuple[str, ...]], rest: Sequence[tuple[str, ...]], width: int) -> Table:
    """Columns as a table; leading columns are wrapped if space is short, at words if possible."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    widths = _lead_widths(lead, width - 1 - sum(map(_column_width, rest)))
    for (heading, *_), size in zip(lead, widths, strict=True):
        table.add_column(heading, overflow="fold", width=size)
    for heading, *_ in rest:
        table.add_column(heading, no_wrap=True)
    _, *rows = zip(*lead, *rest, strict=True)
    for row in rows:
        table.add_row(*row)
    return table


def _lead_widths(lead: Sequence[tuple[str, ...]], available: int) -> list[int]:
    """Widths of the leading columns without padding: that of their longest words, more if there is space."""
    words = [max(cell_len(word) for cell in column for word in (*cell.split(), " ")) for column in lead]
    spare = available - sum(size + _PADDING for size in words)
    widths = []
    for size, column in zip(words, lead, strict=True):
        change = min(_column_width(column) - _PADDING - size, spare) if spare > 0 else max(spare, 1 - size)
        widths.append(size + change)
        spare -= change
    return widths


def results_grid(scores: Sequence[Score]) -> Grid:
    """The scores with standard errors or intervals, runs in the order given; shares are in percent.

    The number of documents is in the heading if it is the same for all runs, else in the cells.
    """
    files = dict.fromkeys(score.file for score in scores)
    apart = traits({file: next(one.run for one in scores if one.file == file) or {} for file in files})
    shown = [score for score in scores if score.value is not None]
    columns: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in sorted(shown, key=lambda score: (score.task, not score.main, score.metric)):
        columns[score.task, score.metric].append(score)
    rows = []
    for file in files:
        with concerning(str(file)):
            own = [score for score in scores if score.file == file]
            cells = {
                (one.task, one.metric): _cell(one, columns[one.task, one.metric])
                for one in own
                if one.value is not None
            }
            run = own[0].run or {}
            head = (run.get("method", "–"), run.get("scheme", "–"), *apart[file].values(), _bits(run), _packed(run))
            rows.append((*map(str, head), *(cells.get(column, "") for column in columns)))
    named = ("method", "scheme", *next(iter(apart.values()), {}))
    header = (*named, "bits (w / a)", "packed size", *(_heading(*column, own) for column, own in columns.items()))
    marks = [_marks([score for score in scores if score.file == file]) for file in files]
    if len(set(marks)) > 1:  # else `results_notes` has them
        header, rows = (*header, "notes"), [(*row, mark) for row, mark in zip(rows, marks, strict=True)]
    return Grid(header, tuple(rows), lead=len(named))


def _heading(task: str, metric: str, column: Sequence[Score]) -> str:
    documents = {score.documents for score in column if score.main}
    count = f", {next(iter(documents))} documents" if len(documents) == 1 and None not in documents else ""
    return f"{task} {metric}{' (%)' * (_scale(column) == PERCENT)}{count}"


def _scale(column: Sequence[Score]) -> int:
    return scale(column[0].metric, *(score.value for score in column))


def _cell(score: Score, column: Sequence[Score]) -> str:
    counts = {other.documents for other in column}
    count = f" (n={score.documents})" if score.main and len(counts) > 1 and score.documents is not None else ""
    return score_text(score.value, score.stderr, _scale(column), score.interval) + count


def _bits(run: dict[str, Any]) -> str:
    decoder = run.get("bits", {}).get("decoder")
    return f"{decoder['weight']:.2f} / {decoder['activation']:.0f}" if decoder else "–"


def _packed(run: dict[str, Any]) -> str:
    packed = run.get("packed_bytes")
    return size(packed) if packed else "–"


def size(count: int | None) -> str:
    """A number of bytes in MB or GB."""
    if count is None:
        return "?"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _marks(run: Sequence[Score]) -> str:
    """Marks a run that is not scored, uses stand-in data, or covers only part of the documents."""
    marks = ["answers only, not scored"] if any(score.value is None for score in run) else []
    marks += ["stand-in data"] if (run[0].run or {}).get("stand_in") else []
    marks += ["not all documents"] if any(score.limited for score in run) else []
    return ", ".join(marks)


def results_notes(scores: Sequence[Score]) -> list[str]:
    """Lines that explain the table's figures."""
    texts = [score.text for score in scores]
    lines = ["±: standard error, if documents are independent"] if any("±" in text for text in texts) else []
    if any("[" in text for text in texts):
        lines.append(f"[…]: Wilson's 95 % interval, if fewer than {FEWEST} documents are right or wrong")
    marks = {_marks([score for score in scores if score.file == file]) for file in {score.file for score in scores}}
    return lines + [f"all runs: {mark}" for mark in marks if mark and len(marks) == 1]
