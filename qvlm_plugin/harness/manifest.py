"""The payload of the entry point ``lmms_eval.models``, by which the harness finds ``--model qvlm``."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "qvlm_llava"
MODEL_IDS = ("qvlm", MODEL_ID)
"""Names of the same model; both run every family."""


def manifests() -> "list[ModelManifest]":
    """The models that this package adds to lmms-eval. Before an evaluation, also adds its tasks.

    Imports nothing slow and never raises: an entry point that raises hides the models of every plugin.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError:  # an lmms-eval without this registry cannot use a manifest either
        return []
    if "lmms_eval.evaluator" in sys.modules:  # which imports the task manager anyway; listing models does not
        _install_tasks()
    return [
        ModelManifest(
            model_id=name,
            simple_class_path="qvlm_plugin.harness.wrapper.QVLMSimple",
            chat_class_path="qvlm_plugin.harness.wrapper.QVLMChat",
        )
        for name in MODEL_IDS
    ]


def _install_tasks() -> None:
    try:
        from qvlm_plugin.harness import refused_options, tasks

        tasks.install()
        refused_options.install_with_tasks()
    except Exception as error:  # another version of lmms-eval; --include_path still finds the tasks
        print(f"qvlm_plugin: its tasks need --include_path with this lmms-eval: {error!r}", file=sys.stderr)
