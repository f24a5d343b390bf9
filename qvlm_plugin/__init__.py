"""Q-VLM post-training quantization of vision-language models, as a plugin of lmms-eval.

Importing this package is cheap: only the modules that need torch, transformers and lmms-eval import them, and the names
of `qvlm_plugin.api` are imported when they are first used. The import also registers quantized checkpoints with
transformers, whichever of the two packages is imported first (`registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from qvlm_plugin.registration import register

if TYPE_CHECKING:
    from qvlm_plugin.api import CalibrationSet, RoundingPlan, apply, quantize, search

__all__ = ["CalibrationSet", "RoundingPlan", "apply", "quantize", "search"]

__version__ = "0.1.0"

register()


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("qvlm_plugin.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
