"""The leaderboard as one HTML file that needs no network and no other file.

Names in results are untrusted. They enter the page as JSON that cannot close its element, the script inserts them as
text only, and the page's policy allows no other script.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from qvlm_plugin import __version__
from qvlm_plugin.report.leaderboard.answers import Answers, answers_of
from qvlm_plugin.report.leaderboard.overview import Overview, overviews
from qvlm_plugin.report.leaderboard.paper import ReportedTable, paper_source
from qvlm_plugin.report.leaderboard.reading import Board
from qvlm_plugin.report.leaderboard.row import Row
from qvlm_plugin.report.leaderboard.tables import APART, APART_NOTE, READING, REPORTED_NOTE
from qvlm_plugin.report.leaderboard.view import Entry, Group, groups
from qvlm_plugin.source import source_commit

SCRIPTS = (
    "text",
    "rows",
    "state",
    "columns",
    "marks",
    "filters",
    "table",
    "plot",
    "details",
    "compare",
    "download",
    "main",
)
"""Parts of the page's script; each may use earlier ones."""

FACTS = (
    "run", "model", "method", "scheme", "weight_bits", "activation_bits", "vision_weight_bits",
    "vision_activation_bits", "packed_bytes", "weight_bytes", "peak_memory_bytes", "tokens_per_second",
    "search_seconds", "backend", "dtype", "device", "calibration", "seed", "options", "arguments", "plan_hash",
    "model_fingerprint", "versions", "date",
)  # fmt: skip
"""Fields of a row that the page shows of a run."""

SCORES = ("value", "stderr", "difference", "rank", "rank_low", "rank_high", "wilson_low", "wilson_high")
"""Fields of a row that the page shows of a score; the script indexes them in this order."""


def html_text(board: Board, reported: Sequence[ReportedTable], base: Path) -> str:
    """The page.

    Args:
        board: ranked rows.
        reported: tables of the paper to show as well.
        base: the page's folder, to which file names in rows are relative.
    """
    found = groups(board.rows)
    numbers = {run: number for number, run in enumerate(dict.fromkeys(row.run for row in board.rows))}
    script = script_text()
    answers = [answers_of(group, board.marks, base) for group in found]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_resource("page.html.j2")).render(
        style=Markup(_resource("page.css")),
        script=Markup(script),
        policy=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(_embedded(_data(board, found, numbers))),
        answers=Markup(_embedded([found_answers and _answers(found_answers, numbers) for found_answers in answers])),
        reading=READING.replace("`", ""),
        apart=APART,
        apart_note=APART_NOTE,
        reported=reported,
        reported_note=REPORTED_NOTE,
        source=paper_source(),
        problems=board.problems,
        made=datetime.now(UTC).date().isoformat(),
        version=__version__,
        commit=source_commit(),
    )


def script_text() -> str:
    """The page's script: its parts in one function scope."""
    parts = "\n".join(_resource(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _data(board: Board, found: Sequence[Group], numbers: dict[str, int]) -> dict[str, Any]:
    rows = {row.run: row for row in board.rows}
    return {
        "runs": [_run(rows[run]) for run in numbers],
        "evaluations": [_evaluation(group, numbers) for group in found],
        "overviews": [_overview(overview, found) for overview in overviews(found, board.marks)],
    }


def _run(row: Row) -> dict[str, Any]:
    version = dict(part.split(" ", 1) for part in (row.versions or "").split(", ") if " " in part).get("qvlm_plugin")
    package = " ".join(filter(None, (version, row.commit and f"({row.commit})"))) or None
    return {name: getattr(row, name) for name in FACTS} | {"package": package}


def _evaluation(group: Group, numbers: dict[str, int]) -> dict[str, Any]:
    own = {name: [entry.scores[name] for entry in group.entries if name in entry.scores] for name in group.metrics}
    return {
        "name": group.name,
        "title": group.title,
        "label": group.label,
        "apart": group.apart,
        "documents": group.entries[0].main.documents,
        "metrics": [
            {"name": name, "higher": rows[0].higher_is_better, "percent": all(row.percent for row in rows)}
            for name, rows in own.items()
        ],
        "entries": [_entry(entry, numbers) for entry in group.entries],
    }


def _entry(entry: Entry, numbers: dict[str, int]) -> dict[str, Any]:
    row = entry.main
    return {
        "run": numbers[row.run],
        "notes": row.notes,
        "file": quote(row.file, errors="replace"),
        "samples": row.samples and quote(row.samples, errors="replace"),
        "scores": {name: [getattr(one, field) for field in SCORES] for name, one in entry.scores.items()},
    }


def _overview(overview: Overview, found: Sequence[Group]) -> dict[str, Any]:
    numbers = [{id(entry): number for number, entry in enumerate(group.entries)} for group in found]
    return {
        "apart": overview.apart,
        "benchmarks": overview.benchmarks,
        "others": overview.others,
        "rows": [
            {
                "id": row.name,
                "variant": row.variant,
                "cells": {index: [numbers[index][id(entry)] for entry in own] for index, own in row.entries.items()},
                "place": overview.rank_intervals.get(row.name),
            }
            for row in overview.configurations
        ],
    }


def _answers(answers: Answers, numbers: dict[str, int]) -> dict[str, Any]:
    return {
        "differing": answers.differing,
        "questions": [[q.id, q.text, q.target, q.image, q.outcomes] for q in answers.questions],
        "pictures": answers.pictures,
        "picks": {numbers[run]: own for run, own in answers.picks.items()},
    }


def _embedded(data: Any) -> str:
    """JSON without characters that are special in HTML."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _resource(name: str) -> str:
    return files(__package__).joinpath("web", name).read_text(encoding="utf-8")
