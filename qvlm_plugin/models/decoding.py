"""The settings of generation, its compilation, and the positions of tokens.

Only the token ids of a checkpoint's generation_config.json are followed: its other settings would change answers
although nobody asked for it.
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
    """A configuration with a checkpoint's token ids, and nothing else of it."""
    return GenerationConfig(**{name: getattr(config, name, None) for name in _TOKENS})


def steering(config: GenerationConfig) -> dict[str, Any]:
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

    The first answers wait for the compiler, and so do those of a new batch size or a longer prompt, a few times.

    Raises:
        QVLMError: transformers does not compile models of this model's quantization.
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
    """The positions that generating would give to the tokens of a batch, padding on the left left out.

    Args:
        model: where its inputs are.
        inputs: of the model; ``input_ids`` and ``attention_mask`` [B, T].

    Returns:
        int64 [B, T]; [4, B, T] of a model that places image tokens in time, height and width, too (Qwen-VL).
    """
    return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
