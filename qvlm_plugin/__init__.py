"""Q-VLM post-training quantization of vision-language models, as a plugin of lmms-eval.

Importing this package is cheap: torch, transformers and lmms-eval are imported only by the modules that need them.
"""

__version__ = "0.1.0"
