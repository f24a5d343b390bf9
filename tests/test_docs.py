"""Commands in the documents are commands that work."""

import re
from pathlib import Path

import lmms_eval.tasks

from qvlm_plugin.calibration import parse_sources
from qvlm_plugin.harness.arguments import parse_arguments
from qvlm_plugin.models.prompts import PROMPT_FORMATS
from qvlm_plugin.scheme import Scheme

PAGE = Path(__file__).parents[1] / "docs" / "reproduce.md"
OURS = ("qvlm_scienceqa", "qvlm_scienceqa_lepa")


def test_every_row_of_the_papers_tables_has_a_command_with_valid_arguments():
    rows = re.findall(r"^evaluate (\S+) (\S+) (table\d/\S+)  # (.+)$", PAGE.read_text(), re.MULTILINE)
    counts = {
        table: sum(folder.startswith(table) for _, _, folder, _ in rows) for table in ("table2", "table3", "table4")
    }
    assert counts == {"table2": 21, "table3": 14, "table4": 7}
    assert len({folder for _, _, folder, _ in rows}) == len(rows)
    folder_of_tasks = Path(lmms_eval.tasks.__file__).parent
    standard = {file.stem for file in folder_of_tasks.rglob("*.yaml")}
    for given, tasks, folder, figure in rows:
        arguments = parse_arguments(dict(pair.split("=", 1) for pair in given.split(",")))
        assert arguments.conv in PROMPT_FORMATS and re.search(r"\d\d\.\d\d$", figure), folder
        assert all(task in OURS or task in standard for task in tasks.split(",")), folder
        if arguments.method != "none":
            assert str(Scheme.parse(arguments.scheme)) == folder.rpartition("-")[2]
            assert [source.count for source in parse_sources(arguments.calibration)] == [64]
