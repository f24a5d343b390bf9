"""The payload of the entry point ``lmms_eval.models``: what makes ``--model qvlm_llava`` known to the harness."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "qvlm_llava"


def manifests() -> "list[ModelManifest]":
    """The models this package adds to lmms-eval.

    Imports nothing heavy and never raises: one entry point that raises hides the models of every plugin.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError:  # an lmms-eval without this registry cannot use a manifest either
        return []
    return [
        ModelManifest(
            model_id=MODEL_ID,
            simple_class_path="qvlm_plugin.harness.wrapper.QVLMSimple",
            chat_class_path="qvlm_plugin.harness.wrapper.QVLMChat",
        )
    ]
