"""The leaderboard as Markdown, CSV and JSON."""

import csv
import html
import io
import json
from collections.abc import Sequence

from qvlm_plugin.report.leaderboard.paper import ReportedTable, paper_source
from qvlm_plugin.report.leaderboard.reading import Board
from qvlm_plugin.report.leaderboard.row import Row
from qvlm_plugin.report.leaderboard.view import Entry, Group, groups
from qvlm_plugin.report.results import Grid, size
from qvlm_plugin.report.shares import FEWEST, PERCENT, number_text, score_text

READING = (
    "Ranks apply within a table, whose rows share data, split, prompt and documents. A rank such as 2–7 gives the "
    "ranks that the documents do not exclude, by paired tests of all runs. Shares are in percent, other scores as "
    "lmms-eval gives them. ±: lmms-eval's standard error, for independent documents; […]: Wilson's 95 % interval, "
    f"if fewer than {FEWEST} documents are right or wrong. `qvlm compare` and `qvlm paired` test differences. "
    "Difference: from the same model in full precision. Size: quantized weights in their formats, scales included, "
    "and everything else in 16 bits. Memory (weights / peak of the run) and speed are measured, and left out if low "
    "bits are simulated (backend reference)."
)
APART = "Stand-in data, or a part of the documents"
APART_NOTE = "These rows say nothing about the real benchmarks. Do not compare them with complete evaluations."
REPORTED_NOTE = "Reported by the paper, not measured here; checkpoints, code and data differ from the rows above."


def json_text(board: Board, reported: Sequence[ReportedTable]) -> str:
    """All rows with descriptions of their fields, the paper's tables, and problems of files."""
    content = {
        "fields": {name: field.description for name, field in Row.model_fields.items()},
        "rows": [row.model_dump(mode="json") for row in board.rows],
        "reported": {
            "source": paper_source(),
            "tables": [
                {
                    "table": table.number,
                    "title": table.title,
                    "note": table.note,
                    "columns": table.columns,
                    "rows": table.rows,
                }
                for table in reported
            ],
        },
        "problems": [{"file": table.file, "message": table.message} for table in board.problems],
    }
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def csv_text(board: Board) -> str:
    """All rows; the columns are the fields of `Row`."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, Row.model_fields, lineterminator="\n")
    writer.writeheader()
    for row in board.rows:
        writer.writerow(row.model_dump() | {"notes": "; ".join(row.notes)})
    return stream.getvalue()


def markdown_text(board: Board, reported: Sequence[ReportedTable]) -> str:
    """A document with a table for each evaluation."""
    found = groups(board.rows)
    apart = [group for group in found if group.apart]
    parts = ["# Leaderboard", READING]
    for group in found:
        if not group.apart:
            parts += [f"## {plain(group.title)}", group_grid(group).markdown()]
    if apart:
        parts += [f"## {APART}", APART_NOTE]
    for group in apart:
        parts += [f"### {plain(group.title)}", group_grid(group).markdown()]
    if reported:
        parts += ["## Reported", f"{REPORTED_NOTE} {paper_source()}."]
    for table in reported:
        parts += [f"### Table {table.number}: {table.title}", table.grid.markdown(), table.note]
    if board.problems:
        problems = [f"- {plain(problem.file)}: {plain(problem.message)}" for problem in board.problems]
        parts += ["## Files with problems", "\n".join(problems)]
    return "\n\n".join(parts) + "\n"


def group_grid(group: Group) -> Grid:
    """An evaluation's runs, and their scores by every metric."""
    main, *others = group.metrics
    header = ("rank", "model", "method", "scheme", "bits", main, "difference", *others)
    header = (*header, "size", "memory", "tokens/s", "search", "notes")
    rows = (_cells(entry, main, others) for entry in group.entries)
    return Grid(tuple(map(plain, header)), tuple(tuple(map(plain, row)) for row in rows))


def _cells(entry: Entry, main: str, others: Sequence[str]) -> tuple[str, ...]:
    row, score = entry.main, entry.scores.get(main)
    return (
        "–" if score is None or score.rank is None else _rank(score),
        row.model,
        row.method or "–",
        row.scheme or "–",
        bits(row),
        cell(score),
        "" if score is None or score.difference is None else _difference(score),
        *(cell(entry.scores.get(metric)) for metric in others),
        size(row.packed_bytes) if row.packed_bytes else "",
        " / ".join(size(value) for value in (row.weight_bytes, row.peak_memory_bytes)) if row.weight_bytes else "",
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}",
        "" if not row.calibration or row.search_seconds is None else f"{row.search_seconds:.0f} s",
        "; ".join(row.notes),
    )


def cell(row: Row | None) -> str:
    """A score with its interval or its standard error, shares in percent."""
    if row is None:
        return ""
    interval = None if row.wilson_low is None else (row.wilson_low, row.wilson_high)
    return score_text(row.value, row.stderr, PERCENT if row.percent else 1, interval)


def _rank(row: Row) -> str:
    return str(row.rank) if row.rank_low in (None, row.rank_high) else f"{row.rank_low}–{row.rank_high}"


def _difference(row: Row) -> str:
    return number_text(row.difference, PERCENT if row.percent else 1, signed=True).replace("-", "−")


def bits(row: Row) -> str:
    """Effective bits of the decoder's weights and activations."""
    return "" if row.weight_bits is None else f"{row.weight_bits:.2f} / {row.activation_bits or 16:.0f}"


def plain(text: str) -> str:
    """Untrusted text, such as a model's name, as one line without markup."""
    return html.escape(" ".join(text.split()), quote=False).replace("`", "'").replace("[", "\\[").replace("*", "\\*")
