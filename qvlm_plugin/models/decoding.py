"""What of a checkpoint's generation_config.json is followed: its tokens. All else would steer answers unasked."""

from typing import Any

from transformers import GenerationConfig

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_CHANGES_NO_ANSWER = (*_TOKENS, "use_cache", "transformers_version")


def plain_config(config: GenerationConfig) -> GenerationConfig:
    """What is left of a checkpoint's configuration: its tokens."""
    return GenerationConfig(**{name: getattr(config, name, None) for name in _TOKENS})


def steering(config: GenerationConfig) -> dict[str, Any]:
    """What a checkpoint's configuration asks for, as far as `plain_config` leaves it out."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if value not in (None, False) and not name.startswith("_") and name not in _CHANGES_NO_ANSWER
    }
