"""Q-VLM post-training quantization of vision-language models, as a plugin of lmms-eval.

Importing this package is cheap: torch, transformers and lmms-eval are imported only by the modules that need them. It
also sees to it that transformers, whether it is imported before or after, loads quantized checkpoints (`registration`).
"""

from qvlm_plugin.registration import register

__version__ = "0.1.0"

register()
