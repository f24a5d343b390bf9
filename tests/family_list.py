"""The families that the package supports, each with a writer of a tiny random checkpoint in its real layout."""

from functools import partial

from moe_llava import write_moe_llava
from original_llava import write_original_llava
from tiny_families import write_tiny_llava_next, write_tiny_llava_onevision
from tiny_llava import write_tiny_llava

FAMILIES = {
    "llava-hf": write_tiny_llava,
    "llava-v1.3": write_original_llava,
    "llava-v1.5": partial(write_original_llava, projector="mlp2x_gelu", pads=True, image_size=42, shards=2),
    "moe-llava": write_moe_llava,
    "llava-next": write_tiny_llava_next,
    "llava-onevision": write_tiny_llava_onevision,
}
