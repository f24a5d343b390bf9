"""Register the package's own tasks, so that lmms-eval finds them by name, without ``--include_path``."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qvlm_plugin.harness.host import wrap_once
from qvlm_plugin.harness.task_index import kept_index


def install() -> None:
    """Add the tasks to lmms-eval's task manager, and cache its index of its own ones. Idempotent."""
    from lmms_eval.tasks import TaskManager

    wrap_once(TaskManager, "_get_task_and_group", _caching_own_tasks)
    wrap_once(TaskManager, "initialize_tasks", _adding_our_tasks)


def _caching_own_tasks(index: Callable) -> Callable:
    """Cache the index of the harness's own tasks: it takes seconds, and calibration and evaluation both need it."""
    import lmms_eval.tasks
    from lmms_eval import utils

    own, parser = Path(lmms_eval.tasks.__file__).parent, Path(utils.__file__)
    read: dict[str, Any] = {}

    def _get_task_and_group(self: Any, task_dir: str) -> dict[str, Any]:
        if Path(task_dir) != own:
            return index(self, task_dir)
        if not read:
            read.update(kept_index(own, parser, lambda: index(self, task_dir)))
        return copy.deepcopy(read)

    return _get_task_and_group


def _adding_our_tasks(initialize: Callable) -> Callable:
    def initialize_tasks(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index = initialize(self, *args, **kwargs)
        for folder in find_spec("qvlm_plugin.tasks").submodule_search_locations:
            index = {**self._get_task_and_group(folder), **index}  # other tasks with these names take precedence
        return index

    return initialize_tasks
