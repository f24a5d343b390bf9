"""The tiny LLaVA of `qvlm doctor`, and what tests look at in it."""

import torch

from qvlm_plugin.doctor.tiny_llava import (
    CHAT_TEMPLATE,
    byte_tokenizer,
    llava_processor,
    random_image,
    randomized,
    write_tiny_llava,
)

__all__ = [
    "CHAT_TEMPLATE", "byte_tokenizer", "llava_processor", "logits_of", "random_image", "randomized", "write_tiny_llava",
]  # fmt: skip


def logits_of(model, inputs):
    """Logits at the positions that are not padding."""
    with torch.inference_mode():
        return model(**inputs).logits[inputs["attention_mask"].bool()]
