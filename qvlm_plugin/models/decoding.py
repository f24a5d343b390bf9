"""The settings of generation, its compilation, and the positions of tokens.

Only the token ids of a checkpoint's generation_config.json are used: its other settings would change answers without
being requested.
"""

import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.placement import empty_model

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_CHANGES_NO_ANSWER = (*_TOKENS, "use_cache", "transformers_version")


def plain_config(config: GenerationConfig) -> GenerationConfig:
    """A configuration that has only the token ids of a checkpoint's configuration."""
    return GenerationConfig(**{name: getattr(config, name, None) for name in _TOKENS})


def ignored_settings(config: GenerationConfig) -> dict[str, Any]:
    """The settings of a checkpoint's configuration that `plain_config` leaves out."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if value not in (None, False) and not name.startswith("_") and name not in _CHANGES_NO_ANSWER
    }


def check_compilation(config: PretrainedConfig, device: torch.device, trust_remote_code: bool = False) -> None:
    """Check that `compile_decoding` can work, before weights are loaded.

    Raises:
        QVLMError: transformers cannot compile this model, or there is no C++ compiler for a CPU.
    """
    model = empty_model(config, trust_remote_code)
    if not model._can_compile_fullgraph:
        raise QVLMError(f"compile=true: transformers does not compile {type(model).__name__}; leave it out")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise QVLMError(f"compile=true needs a C++ compiler on a CPU: install {' or '.join(compilers)}, or set CXX")


def compile_decoding(model: PreTrainedModel) -> None:
    """Make ``generate`` compile the step that decodes a token, with a cache of fixed size; prompts are not compiled.

    The first answers wait for the compiler, as do a few later ones with a new batch size or a longer prompt.

    Raises:
        QVLMError: transformers does not compile models with this model's quantization.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        method = quantizer.quantization_config.quant_method
        raise QVLMError(f"compile=true: transformers does not compile checkpoints quantized by {method}; leave it out")
    compile_config = CompileConfig()
    compile_config._compile_all_devices = True  # otherwise transformers compiles on accelerators only
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = compile_config


def positions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The positions that generation gives to the tokens of a batch; padding on the left is not counted.

    Args:
        model: the model, on the device of its inputs.
        inputs: the model's inputs, with ``input_ids`` and ``attention_mask`` [B, T].

    Returns:
        int64 [B, T]; [4, B, T] for a model whose image tokens also have positions in time, height and width (Qwen-VL).
    """
    return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
