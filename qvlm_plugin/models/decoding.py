"""The settings of generation, and the positions of tokens.

Only the token ids of a checkpoint's generation_config.json are followed: its other settings would change answers
although nobody asked for it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

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


def positions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The positions that generating would give to the tokens of a batch, padding on the left left out.

    Args:
        model: where its inputs are.
        inputs: of the model; ``input_ids`` and ``attention_mask`` [B, T].

    Returns:
        int64 [B, T]; [4, B, T] of a model that places image tokens in time, height and width, too (Qwen-VL).
    """
    return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
