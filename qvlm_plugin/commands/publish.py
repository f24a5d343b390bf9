"""``qvlm publish`` and ``qvlm check-submission``: results for model cards and for official test servers."""

from pathlib import Path
from typing import Annotated

import typer

from qvlm_plugin.commands.shared import needs_report_packages


def publish(
    results: Annotated[list[Path], typer.Argument(help="Results files of one quantized checkpoint, or their folders.")],
    to: Annotated[Path, typer.Option(help="Folder of the quantized checkpoint.")],
    source_url: Annotated[
        str | None, typer.Option(help="Web page that shows the runs, to link to as the source.")
    ] = None,
) -> None:
    """Write scores into a checkpoint's model card (model-index) and its .eval_results folder.

    Refuses runs on stand-in data or on a part of the documents, and runs of several plans.

    Example: qvlm publish results/qvlm-w4a4 --to llava-1.5-7b-w4a4
    """
    with needs_report_packages():
        from qvlm_plugin.report.publishing import publish_results, publishable

    for file in publish_results(publishable(results), to, source_url):
        typer.echo(file)


def check_submission(
    file: Annotated[Path, typer.Argument(help="A submission file of vizwiz_vqa_test or vqav2_test.")],
) -> None:
    """Check a submission file against the format that VizWiz-VQA's or VQA-v2's test server accepts.

    Example: qvlm check-submission results/submissions/vqav2-test-submission-2026-11-21-12-00-00.json
    """
    from qvlm_plugin.report.submission import check_submission as check

    found, count = check(file)
    typer.echo(f"{file}: {count} answers in {found.benchmark}'s format")
    if count != found.count:
        typer.echo(f"the test split has {found.count} questions; the server requires an answer to each", err=True)
