"""Add scores to the model card of a quantized checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from qvlm_plugin.atomic import write_file
from qvlm_plugin.model_card import CARD
from qvlm_plugin.report.results import Score, results_grid, results_notes


def add_evaluation(folder: Path, scores: Sequence[Score]) -> None:
    """Add a table of scores to a checkpoint's card.

    Args:
        folder: the checkpoint's folder.
        scores: one or more scores of runs with its plan.
    """
    backends = sorted({str((score.run or {}).get("backend")) for score in scores})
    notes = "\n".join(f"- {note}" for note in (*results_notes(scores), f"by lmms-eval, backend {', '.join(backends)}"))
    text = (folder / CARD).read_text(encoding="utf-8")
    write_file(folder / CARD, f"{text}\n## Evaluation\n\n{results_grid(scores).markdown()}\n\n{notes}\n".encode())
