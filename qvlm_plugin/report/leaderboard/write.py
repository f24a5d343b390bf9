"""Write the leaderboard's files."""

from collections.abc import Sequence
from pathlib import Path

from qvlm_plugin.atomic import write_file
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.leaderboard.page import html_text
from qvlm_plugin.report.leaderboard.paper import paper_tables
from qvlm_plugin.report.leaderboard.ranking import rank
from qvlm_plugin.report.leaderboard.reading import Board, read_board
from qvlm_plugin.report.leaderboard.schema import find_results_files
from qvlm_plugin.report.leaderboard.tables import csv_text, json_text, markdown_text


def write_leaderboard(paths: Sequence[Path], output: Path, *, with_reported: bool) -> Board:
    """Read results, rank them, and write ``leaderboard.md``, ``.csv``, ``.json`` and ``.html``.

    Args:
        paths: results files, or folders that contain some.
        output: folder to write to.
        with_reported: whether to show the paper's tables on the same benchmarks.

    Returns:
        The rows, and problems of files.

    Raises:
        QVLMError: no results file was found, or none contains a score.
    """
    files = find_results_files(paths)
    board = rank(read_board(files, output))
    if not board.rows:
        first = board.problems[0]
        raise QVLMError(f"none of {len(files)} results files contains a score; {first.file} {first.message}")
    reported = paper_tables([row.task for row in board.rows]) if with_reported else []
    texts = {
        "json": json_text(board, reported),
        "csv": csv_text(board),
        "md": markdown_text(board, reported),
        "html": html_text(board, reported, output),
    }
    for suffix, text in texts.items():
        write_file(output / f"leaderboard.{suffix}", text.encode("utf-8", "replace"))
    return board
