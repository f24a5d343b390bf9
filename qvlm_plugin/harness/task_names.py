"""Check names of tasks before the harness is started."""

import contextlib
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qvlm_plugin.errors import QVLMError

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

_NAME = re.compile(rb"^(?:task|group|tag)[ \t]*:[ \t]*[\"']?([^\s\"'#]+)[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE)


def check_task_names(names: Sequence[str], directory: Path) -> None:
    """Check that each name is a task of lmms-eval, or a task's file relative to ``directory``.

    Most names appear literally in their task's file, and searching these takes well below a second. Only for other
    names is the harness imported, which indexes all its tasks.

    Raises:
        QVLMError: a task is unknown; the message suggests similar names.
    """
    listed = set(_listed())
    if unknown := [name for name in names if name not in listed and not (directory / name).is_file()]:
        known = _indexed()
        for name in unknown:
            if not known.match_tasks([name]):
                similar = difflib.get_close_matches(name, known.all_tasks, 3, 0.7)
                hint = f"; did you mean {' or '.join(similar)}?" if similar else "; see: lmms-eval tasks list"
                raise QVLMError(f"--tasks: lmms-eval has no task {name!r}{hint}")


def _listed() -> Iterator[str]:
    """The names at the top of task files, the harness's and this package's."""
    if (harness := find_spec("lmms_eval")) is None:
        raise QVLMError("lmms-eval is not installed: pip install lmms-eval")
    folders = [Path(folder) / "tasks" for folder in harness.submodule_search_locations or ()]
    folders += map(Path, find_spec("qvlm_plugin.tasks").submodule_search_locations)
    for file in (file for folder in folders for file in folder.rglob("*.yaml")):
        yield from (name.decode("utf-8", "replace") for name in _NAME.findall(file.read_bytes()))


def _indexed() -> "TaskManager":
    """The harness's own index."""
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    from qvlm_plugin.harness import tasks

    tasks.install()
    logger.disable("lmms_eval")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return TaskManager("ERROR")
    finally:
        logger.enable("lmms_eval")
