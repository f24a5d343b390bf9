"""Refuse options and tasks of lmms-eval that its request format does not support, for this package's models.

lmms-eval prepends ``--system_instruction`` and the examples of ``--num_fewshot`` to a prompt's text, which only its
"simple" format passes to a model: in the chat format, samples log text that the model never saw. Tasks that score by
likelihood exist in the simple format only.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lmms_eval import evaluator
from lmms_eval.evaluator_utils import get_task_list

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.host import wrap_once
from qvlm_plugin.harness.manifest import MODEL_IDS


def install() -> None:
    """Refuse them before a model is created or, if installed too late for that, before it answers."""
    for name in ("simple_evaluate", "evaluate"):
        wrap_once(evaluator, name, _refusing)


def install_with_tasks() -> None:
    """Call `install` when the task manager is created: before that, lmms-eval may not have finished its imports."""
    from lmms_eval.tasks import TaskManager

    wrap_once(TaskManager, "__init__", _installing)


def _installing(initialize: Callable) -> Callable:
    def __init__(self: object, *args: Any, **kwargs: Any) -> None:
        install()
        initialize(self, *args, **kwargs)

    return __init__


def _refusing(evaluate: Callable) -> Callable:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model", kwargs.get("lm"))
        if model in MODEL_IDS or type(model).__module__.startswith("qvlm_plugin."):
            _check(model, kwargs)
        return evaluate(*args, **kwargs)

    return refusing


def _check(model: Any, options: Mapping[str, Any]) -> None:
    """Raise QVLMError if the model would not see an option; ``model`` is a name or an object."""
    if options.get("system_instruction") is not None:
        raise QVLMError("--system_instruction does not reach the model; use the model argument system_prompt=TEXT")
    if getattr(model, "is_simple", True):  # unknown yet, or the format that supports everything
        return
    for output in get_task_list(options.get("task_dict") or {}):
        if output.task is None:
            continue
        if output.task.get_config("output_type") in ("loglikelihood", "multiple_choice"):
            raise QVLMError(
                f"task {output.task_name} scores by likelihood, which lmms-eval supports in its simple format only; "
                "add --force_simple"
            )
        if count := output.task.get_config("num_fewshot"):
            raise QVLMError(
                f"task {output.task_name} has {count} examples (--num_fewshot), which lmms-eval supports in its simple "
                "format only; add --force_simple"
            )
