"""The families that the package supports, each with a writer of a tiny random checkpoint in its real layout."""

from functools import partial

from moe_llava import write_moe_llava
from original_llava import write_original_llava
from tiny_families import (
    write_tiny_gemma3,
    write_tiny_idefics3,
    write_tiny_internvl,
    write_tiny_llava_next,
    write_tiny_llava_onevision,
    write_tiny_mistral3,
    write_tiny_paligemma2,
    write_tiny_pixtral,
    write_tiny_qwen2_5_vl,
    write_tiny_qwen2_vl,
    write_tiny_qwen3_vl,
    write_tiny_smolvlm,
)
from tiny_llava import write_tiny_llava

ORIGINAL = {
    "llava-v1.3": write_original_llava,
    "llava-v1.5": partial(write_original_llava, projector="mlp2x_gelu", pads=True, image_size=42, shards=2),
    "moe-llava": write_moe_llava,
}
"""Those in the layout of LLaVA's own code."""

HUGGING_FACE = {
    "gemma3": write_tiny_gemma3,
    "idefics3": write_tiny_idefics3,
    "internvl": write_tiny_internvl,
    "llava": write_tiny_llava,
    "llava-next": write_tiny_llava_next,
    "llava-onevision": write_tiny_llava_onevision,
    "mistral3": write_tiny_mistral3,
    "paligemma2": write_tiny_paligemma2,
    "pixtral": write_tiny_pixtral,
    "qwen2-vl": write_tiny_qwen2_vl,
    "qwen2.5-vl": write_tiny_qwen2_5_vl,
    "qwen3-vl": write_tiny_qwen3_vl,
    "smolvlm": write_tiny_smolvlm,
}
"""Those in the layout of transformers."""

FAMILIES = ORIGINAL | HUGGING_FACE
