"""Q-VLM post-training quantization of vision-language models, as a plugin of lmms-eval.

Importing this package is cheap: torch, transformers and lmms-eval are imported only by the modules that need them, and
the names of `qvlm_plugin.api` when they are first used. It also sees to it that transformers, whether it is imported
before or after, loads quantized checkpoints (`registration`).
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
