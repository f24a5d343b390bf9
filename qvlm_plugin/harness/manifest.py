"""The payload of the entry point ``lmms_eval.models``: what makes ``--model qvlm`` known to the harness."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "qvlm_llava"
MODEL_IDS = ("qvlm", MODEL_ID)
"""Names of one and the same model: any of them runs every family."""


def manifests() -> "list[ModelManifest]":
    """The models this package adds to lmms-eval; where an evaluation is about to begin, its tasks too.

    Imports nothing heavy and never raises: one entry point that raises hides the models of every plugin.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError:  # an lmms-eval without this registry cannot use a manifest either
        return []
    if "lmms_eval.evaluator" in sys.modules:  # it imports the task manager anyway; a list of models does not
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
    except Exception as error:  # with another lmms-eval; --include_path still finds them
        print(f"qvlm_plugin: its tasks need --include_path with this lmms-eval: {error!r}", file=sys.stderr)
