"""Paired comparisons as JSON rows, as a table, and the notes that explain it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvlm_plugin.report.estimates import difference_text, estimate_data, estimate_text
from qvlm_plugin.report.naming import labels
from qvlm_plugin.report.paired import AVERAGE, Comparison, Flips
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.samples import RunSamples
from qvlm_plugin.report.shares import FEWEST, unit_text
from qvlm_plugin.report.significance import DRAWS, holm, p_text


def paired_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The comparisons as JSON data; Holm's adjustment covers all of them."""
    return [
        {
            "run": row.run.name,
            "file": str(row.run.file),
            "model": (row.run.run or {}).get("pretrained"),
            "backend": (row.run.run or {}).get("backend"),
            "task": row.task,
            "documents": row.documents,
            "clusters": row.clusters,
            "images_unknown": row.unknown,
            **estimate_data("baseline", row.baseline),
            **estimate_data("score", row.score),
            **estimate_data("difference", row.difference),
            "p": row.p,
            "p_holm": adjusted,
            "broke": row.flips.broke,
            "fixed": row.flips.fixed,
            "changed": row.flips.changed,
        }
        for row, adjusted in zip(comparisons, holm([row.p for row in comparisons]), strict=True)
    ]


def paired_grid(baseline: RunSamples, comparisons: Sequence[Comparison]) -> Grid:
    """The comparisons as a table, shares in percent; Holm's adjustment covers all its rows."""
    names = _names(baseline, comparisons)
    rows = [
        (
            names[row.run.file],
            row.task,
            estimate_text(row.baseline, row.scale),
            estimate_text(row.score, row.scale),
            difference_text(row.difference, row.scale),
            p_text(row.p, row.unknown),
            p_text(adjusted, row.unknown),
            flips_text(row.flips),
        )
        for row, adjusted in zip(comparisons, holm([row.p for row in comparisons]), strict=True)
    ]
    header = ("run", "task", "baseline", "score", "difference", "p", "p (Holm)", "broke / fixed / changed")
    return Grid(header, tuple(rows), lead=2)


def _names(baseline: RunSamples, comparisons: Sequence[Comparison]) -> dict[Path, str]:
    return labels({run.file: run.run or {} for run in (baseline, *(row.run for row in comparisons))})


def paired_notes(baseline: RunSamples, comparisons: Sequence[Comparison], metric: str) -> list[str]:
    """Lines that explain the table's figures."""
    compared = {row.task: row for row in comparisons if row.task != AVERAGE}
    unit = unit_text(min(row.scale for row in comparisons))
    lines = [
        f"baseline: {_names(baseline, comparisons)[baseline.file]}, {baseline.file}",
        f"{metric} {unit} ± standard error, or with Wilson's 95 % interval if fewer than {FEWEST} documents are "
        "right or fewer than that are wrong",
        "difference: run minus baseline (points for shares) with its 95 % interval; average: unweighted mean over "
        "tasks",
        f"p: sign-flip test (McNemar's for 0/1 scores of independent documents), exact or from {DRAWS:,} samples "
        f"(then at least {1 / (DRAWS + 1):.0e}); Holm over all {len(comparisons)} rows",
        "broke, fixed: documents that score lower, higher (right→wrong, wrong→right); changed: different answers",
        *(f"{task}: {_clusters(row)}" for task, row in compared.items()),
        *(total_note(task, metric) for task, row in compared.items() if row.total),
    ]
    if left_out := [task for task in baseline.tasks if task not in compared]:
        lines.append(f"left out, without {metric}: {', '.join(left_out)}")
    if any((run.run or {}).get("stand_in") for run in (baseline, *(row.run for row in comparisons))):
        lines.append("stand-in data")
    return lines


def _clusters(row: Comparison) -> str:
    if row.unknown:
        return unknown_note(row.unknown, row.documents)
    if row.clusters == row.documents:
        return f"{row.documents} documents, treated as independent: no two share an image"
    return f"{row.documents} documents in {row.clusters} clusters of the same image"


def total_note(task: str, metric: str) -> str:
    """Explains the figures of a score that a task computes from all documents at once."""
    return (
        f"{task}: {metric} is computed from all documents at once, so it has no standard error and no interval; p and "
        "flips use the documents' own scores"
    )


def unknown_note(unknown: int, documents: int) -> str:
    """Explains what follows if some documents' images are unknown."""
    return (
        f"{documents} documents; the image of {unknown} is not recorded, so whether they are independent is unknown: "
        "if some share an image, errors, intervals and p (marked ?) are too small"
    )


def flips_text(flips: Flips) -> str:
    """Counts of changed documents for a table."""
    return f"{flips.broke} / {flips.fixed} / {flips.changed}"
