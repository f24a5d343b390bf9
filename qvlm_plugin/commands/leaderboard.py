"""``qvlm leaderboard``: rank results, and collect runs in a shared folder."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from qvlm_plugin.commands.shared import needs_report_packages, working_in

WRITE = "write"


class _WriteByDefault(TyperGroup):
    """Runs ``write`` if the first argument is not a sub-command."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [WRITE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_WriteByDefault,
    help="Rank the results of many runs in one table: qvlm leaderboard DIR… --out OUT.",
    no_args_is_help=True,
)


@app.command(WRITE)
def write(
    paths: Annotated[list[Path], typer.Argument(help="Results files of lmms-eval, or folders that contain them.")],
    out: Annotated[Path, typer.Option(help="Folder for leaderboard.md, .csv, .json and .html.")],
    reported: Annotated[bool, typer.Option(help="Also show the scores that the paper reports.")] = True,
) -> None:
    """Write leaderboard.md, .csv, .json and .html; the word "write" may be omitted.

    Ranks rows together only if data, split, prompt and documents are the same. Reports files with problems, and leaves
    their rows out or unranked.

    Example: qvlm leaderboard results/ --out leaderboard
    """
    with needs_report_packages():
        from qvlm_plugin.report.leaderboard.write import write_leaderboard

    board = write_leaderboard(paths, out, with_reported=reported)
    for problem in board.problems:
        typer.echo(f"{problem.file}: {problem.message}", err=True)
    typer.echo(out / "leaderboard.md")


@app.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="Results file of a run with --log_samples.")],
    to: Annotated[Path, typer.Option(help="Folder that collects runs, for example in a git checkout.")],
) -> None:
    """Check a run and copy it, with its samples, into a shared folder.

    Refuses a run without provenance, with a seal that does not match its files, on only a part of the documents,
    calibrated on evaluated documents, or with other scores than a run of the same model, plan and documents.

    Example: qvlm leaderboard add results/model/20261121_120000_results.json --to shared-results
    """
    from qvlm_plugin.report.leaderboard.adding import add_run

    typer.echo(add_run(file, to))


@app.command("thumbnails")
def thumbnails(
    paths: Annotated[list[Path], typer.Argument(help="Results files of runs with --log_samples, or folders of them.")],
    data: Annotated[
        Path | None, typer.Option(help="Working directory of the runs: local copies of data sets are looked up in it.")
    ] = None,
) -> None:
    """Write thumbnails of the evaluated images next to the samples, so that the leaderboard's page can show them.

    Reads the images again from the tasks' data, and checks that they are the evaluated ones. Check the data's license
    before you share the files.

    Example: qvlm leaderboard thumbnails results/ --data demo-data
    """
    from qvlm_plugin.harness.thumbnails import write_thumbnails
    from qvlm_plugin.report.leaderboard.schema import find_results_files

    files = [file.resolve() for file in find_results_files(paths)]
    with working_in(data):
        for file in files:
            typer.echo(f"{file}: {write_thumbnails(file)} thumbnails written")
