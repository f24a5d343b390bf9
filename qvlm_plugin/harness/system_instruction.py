"""lmms-eval's ``--system_instruction`` is refused for this package's models, which have ``system_prompt=``.

lmms-eval writes it in front of a prompt's text, which only its "simple" format hands to a model: in the chat format
samples show an instruction that the model never saw.
"""

from collections.abc import Callable
from typing import Any

from lmms_eval import evaluator

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.host import wrap_once
from qvlm_plugin.harness.manifest import MODEL_ID


def install() -> None:
    """Refuse it before a model is made and, where that was too late to install, before it answers."""
    for name in ("simple_evaluate", "evaluate"):
        wrap_once(evaluator, name, _refusing)


def install_with_tasks() -> None:
    """`install` once the task manager is made: before that, lmms-eval may still be in the middle of its imports."""
    from lmms_eval.tasks import TaskManager

    wrap_once(TaskManager, "__init__", _installing)


def _installing(initialize: Callable) -> Callable:
    def __init__(self: object, *args: Any, **kwargs: Any) -> None:
        install()
        initialize(self, *args, **kwargs)

    return __init__


def _refusing(evaluate: Callable) -> Callable:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        model = next(iter(args), kwargs.get("model", kwargs.get("lm")))
        ours = model == MODEL_ID or type(model).__module__.startswith("qvlm_plugin.")
        if ours and kwargs.get("system_instruction") is not None:
            raise QVLMError("--system_instruction is not shown to the model; write model argument system_prompt=TEXT")
        return evaluate(*args, **kwargs)

    return refusing
