"""Vision towers, by ``config.vision_config.model_type``."""

from qvlm_plugin.topology import Group, Stack

CLIP_BLOCK = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), producer="layer_norm1"),
    Group(("self_attn.out_proj",), producer="self_attn.v_proj"),
    Group(("mlp.fc1",), producer="layer_norm2"),
    Group(("mlp.fc2",)),
)

DINOV2_BLOCK = (
    Group(("attention.q_proj", "attention.k_proj", "attention.v_proj"), producer="norm1"),
    Group(("attention.o_proj",), producer="attention.v_proj"),
    Group(("mlp.fc1",), producer="norm2"),
    Group(("mlp.fc2",)),
)

VISION_TOWERS = {
    "clip_vision_model": Stack("encoder.layers", CLIP_BLOCK),
    "siglip_vision_model": Stack("encoder.layers", CLIP_BLOCK),
    "dinov2": Stack("encoder.layer", DINOV2_BLOCK),
}
