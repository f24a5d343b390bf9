"""The package's own tasks, found by name alone. Elsewhere ``--include_path`` does the same for their folder."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qvlm_plugin.harness.host import wrap_once


def install() -> None:
    """Let lmms-eval's task manager know the tasks, and read its own ones once. Repeating it changes nothing."""
    from lmms_eval.tasks import TaskManager

    wrap_once(TaskManager, "_get_task_and_group", _reading_the_harness_once)
    wrap_once(TaskManager, "initialize_tasks", _knowing_ours)


def _reading_the_harness_once(index: Callable) -> Callable:
    """Indexing the harness's two thousand tasks takes seconds, and a run does it to calibrate and to evaluate."""
    import lmms_eval.tasks

    own = Path(lmms_eval.tasks.__file__).parent
    read: dict[str, Any] = {}

    def _get_task_and_group(self: Any, task_dir: str) -> dict[str, Any]:
        if Path(task_dir) != own:
            return index(self, task_dir)
        if not read:
            read.update(index(self, task_dir))
        return copy.deepcopy(read)

    return _get_task_and_group


def _knowing_ours(initialize: Callable) -> Callable:
    def initialize_tasks(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index = initialize(self, *args, **kwargs)
        for folder in find_spec("qvlm_plugin.tasks").submodule_search_locations:
            index = {**self._get_task_and_group(folder), **index}  # other tasks of these names win
        return index

    return initialize_tasks
