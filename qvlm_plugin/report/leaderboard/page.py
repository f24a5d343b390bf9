"""The leaderboard as one HTML file that needs nothing else: no network, no other file.

Names come from whoever made the results. They reach the page as JSON that cannot end its element, its script writes
them as text only, and the page's policy lets no other script run.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from qvlm_plugin.report.leaderboard.paper import ReportedTable, paper_source
from qvlm_plugin.report.leaderboard.reading import Board
from qvlm_plugin.report.leaderboard.row import Row
from qvlm_plugin.report.leaderboard.tables import APART, APART_NOTE, READING, REPORTED_NOTE
from qvlm_plugin.report.leaderboard.view import Entry, groups

SHOWN = (
    "model", "method", "scheme", "notes", "weight_bits", "activation_bits", "vision_weight_bits",
    "vision_activation_bits", "packed_bytes", "weight_bytes", "peak_memory_bytes", "tokens_per_second",
    "search_seconds", "backend", "dtype", "device", "calibration", "options", "arguments", "plan_hash",
    "model_fingerprint", "versions", "date", "run",
)  # fmt: skip
"""Fields of a row that the page tells of a run."""


def html_text(board: Board, reported: Sequence[ReportedTable]) -> str:
    """The page."""
    script = _resource("page.js")
    data = {
        "evaluations": [
            {
                "title": group.title,
                "apart": group.apart,
                "metrics": [
                    {"name": name, "higher": _any(group.entries, name).higher_is_better} for name in group.metrics
                ],
                "runs": [_run(entry) for entry in group.entries],
            }
            for group in groups(board.rows)
        ]
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_resource("page.html.j2")).render(
        style=Markup(_resource("page.css")),
        script=Markup(script),
        policy=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(_embedded(data)),
        reading=READING.replace("`", ""),
        apart=APART,
        apart_note=APART_NOTE,
        reported=reported,
        reported_note=REPORTED_NOTE,
        source=paper_source(),
        problems=board.problems,
    )


def _run(entry: Entry) -> dict:
    row = entry.main
    return {
        **{name: getattr(row, name) for name in SHOWN},
        "scores": {
            name: {field: getattr(one, field) for field in ("value", "percent", "stderr", "rank", "drop")}
            for name, one in entry.scores.items()
        },
        "file": quote(row.file, errors="replace"),
        "samples": row.samples and quote(row.samples, errors="replace"),
    }


def _any(entries: Sequence[Entry], metric: str) -> Row:
    return next(entry.scores[metric] for entry in entries if metric in entry.scores)


def _embedded(data: dict) -> str:
    """JSON that holds no character with a meaning in HTML."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
