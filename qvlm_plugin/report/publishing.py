"""Write a quantized checkpoint's scores into the metadata of its model card, in the hub's two formats.

These are ``model-index`` in README.md's front matter, and ``.eval_results/*.yaml``, which feeds the leaderboards of
benchmark data sets (https://huggingface.co/docs/hub/eval-results). huggingface_hub writes both.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from qvlm_plugin.atomic import write_file
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.leaderboard.ranking import rank
from qvlm_plugin.report.leaderboard.reading import read_board
from qvlm_plugin.report.leaderboard.row import Row
from qvlm_plugin.report.leaderboard.schema import find_results_files

TASK_TYPE = "visual-question-answering"


def publishable(paths: Sequence[Path]) -> list[Row]:
    """Read results and check that they may be published: all rows of one plan, on all documents of the real data.

    Raises:
        QVLMError: a file has a problem, or a row must not be published.
    """
    board = rank(read_board(find_results_files(paths), Path.cwd()))
    if board.problems:
        first = board.problems[0]
        raise QVLMError(f"{first.file}: {first.message}")
    for row in board.rows:
        if row.method is None:
            raise QVLMError(f"{row.file} was not written by --model qvlm; publish results of --model qvlm")
        if row.notes:
            raise QVLMError(f"{row.file}: {row.task} must not be published: {'; '.join(row.notes)}")
    if len({row.plan_hash for row in board.rows}) != 1:
        files = ", ".join(sorted({row.file for row in board.rows}))
        raise QVLMError(f"the results are those of several plans, but a checkpoint has one: {files}")
    return board.rows


def publish_results(rows: Sequence[Row], checkpoint: Path, source_url: str | None = None) -> list[Path]:
    """Write the rows into a checkpoint's model card and ``.eval_results`` folder; keeps all other content.

    Args:
        rows: see `publishable`.
        checkpoint: the checkpoint's folder; README.md is created if missing.
        source_url: page that shows the runs.

    Returns:
        The files written.

    Raises:
        QVLMError: the folder does not exist, or the front matter of its README.md is invalid.
    """
    if not checkpoint.is_dir():
        raise QVLMError(f"{checkpoint}: no such folder")
    readme = checkpoint / "README.md"
    try:
        card = ModelCard(readme.read_text(encoding="utf-8") if readme.is_file() else f"# {checkpoint.resolve().name}\n")
    except (ValueError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise QVLMError(f"{readme}: invalid front matter: {' '.join(str(error).split())}") from error
    others, name = card.data.eval_results or [], card.data.get("model_name") or checkpoint.resolve().name
    data = {key: value for key, value in card.data.to_dict().items() if key not in ("model-index", "model_name")}
    added = [_eval_result(row, source_url) for row in rows]
    keys = {(result.unique_identifier, result.metric_type, result.metric_name) for result in added}
    kept = [
        result for result in others if (result.unique_identifier, result.metric_type, result.metric_name) not in keys
    ]
    card.data = ModelCardData(**data, model_name=name, eval_results=[*kept, *added])
    files = {readme: str(card)}
    for row in rows:
        if row.main:
            entries = eval_result_entries_to_yaml([_entry(row, source_url)])
            variant = re.sub(r"[^A-Za-z0-9_.+-]", "_", f"{row.task}-{row.method}-{row.scheme}-{row.backend}")
            file = checkpoint / ".eval_results" / f"{variant}.yaml"
            files[file] = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    for file, text in files.items():
        write_file(file, text.encode())
    return list(files)


def _eval_result(row: Row, source_url: str | None) -> EvalResult:
    return EvalResult(
        task_type=TASK_TYPE,
        task_name=row.task,
        dataset_type=row.dataset or row.task,
        dataset_name=" ".join(part for part in (row.dataset or row.task, row.dataset_config) if part),
        dataset_config=row.dataset_config,
        dataset_split=row.split,
        dataset_revision=_revision(row),
        metric_type="accuracy" if row.metric == "exact_match" else row.metric,
        metric_name=f"{row.task} {row.metric}{' (%)' if row.percent else ''}, {_setup(row)}",
        metric_value=_value(row),
        source_name="lmms-eval" if source_url else None,
        source_url=source_url,
    )


def _entry(row: Row, source_url: str | None) -> EvalResultEntry:
    return EvalResultEntry(
        dataset_id=row.dataset or row.task,
        task_id=row.task,
        value=_value(row),
        dataset_revision=_revision(row),
        date=_iso(row.date),
        source_url=source_url,
        source_name="lmms-eval" if source_url else None,
        notes=f"{row.metric}{' in percent' if row.percent else ''} by lmms-eval; {_setup(row)}; {row.split} split, "
        f"{row.documents} documents; plan {(row.plan_hash or '?')[:12]}",
    )


def _value(row: Row) -> float:
    """The score as the hub shows it: shares in percent."""
    return round(100 * row.value if row.percent else row.value, 2)


def _setup(row: Row) -> str:
    return f"{row.method} {row.scheme}, backend {row.backend}"


def _revision(row: Row) -> str | None:
    return row.data if row.data and re.fullmatch(r"[0-9a-f]{40}", row.data) else None


def _iso(date: str | None) -> str | None:
    """The day of a date in lmms-eval's format, such as ``20261121_120000``, as YYYY-MM-DD."""
    found = re.match(r"(\d{4})(\d\d)(\d\d)_", date or "")
    return f"{found[1]}-{found[2]}-{found[3]}" if found else None
