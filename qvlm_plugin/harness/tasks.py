"""The package's own tasks, found by name alone. Elsewhere ``--include_path`` does the same for their folder."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from qvlm_plugin.harness.host import wrap_once


def install() -> None:
    """Let lmms-eval's task manager know the tasks. Repeating it changes nothing."""
    from lmms_eval.tasks import TaskManager

    wrap_once(TaskManager, "initialize_tasks", _knowing_ours)


def _knowing_ours(initialize: Callable) -> Callable:
    def initialize_tasks(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index = initialize(self, *args, **kwargs)
        for folder in find_spec("qvlm_plugin.tasks").submodule_search_locations:
            index = {**self._get_task_and_group(folder), **index}  # other tasks of these names win
        return index

    return initialize_tasks
