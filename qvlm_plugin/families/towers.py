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

INTERNVL_BLOCK = (
    Group(("attention.q_proj", "attention.k_proj", "attention.v_proj"), producer="layernorm_before"),
    Group(("attention.projection_layer",), producer="attention.v_proj"),
    Group(("mlp.fc1",), producer="layernorm_after"),
    Group(("mlp.fc2",)),
)

PIXTRAL_BLOCK = (
    Group(("attention.q_proj", "attention.k_proj", "attention.v_proj"), producer="attention_norm"),
    Group(("attention.o_proj",), producer="attention.v_proj"),
    Group(("feed_forward.gate_proj", "feed_forward.up_proj"), producer="ffn_norm"),
    Group(("feed_forward.down_proj",), producer="feed_forward.up_proj"),
)

# Queries, keys and values are one Linear: scales of the values alone cannot be folded into it.
FUSED_ATTENTION = (Group(("attn.qkv",), producer="norm1"), Group(("attn.proj",)))
QWEN2_BLOCK = (*FUSED_ATTENTION, Group(("mlp.fc1",), producer="norm2"), Group(("mlp.fc2",)))
QWEN2_5_BLOCK = (
    *FUSED_ATTENTION,
    Group(("mlp.gate_proj", "mlp.up_proj"), producer="norm2"),
    Group(("mlp.down_proj",), producer="mlp.up_proj"),
)
QWEN3_BLOCK = (*FUSED_ATTENTION, Group(("mlp.linear_fc1",), producer="norm2"), Group(("mlp.linear_fc2",)))

VISION_TOWERS = {
    "clip_vision_model": Stack("encoder.layers", CLIP_BLOCK),
    "dinov2": Stack("encoder.layer", DINOV2_BLOCK),
    "idefics3_vision": Stack("encoder.layers", CLIP_BLOCK),
    "internvl_vision": Stack("encoder.layer", INTERNVL_BLOCK),
    "pixtral": Stack("transformer.layers", PIXTRAL_BLOCK),
    "qwen2_5_vl_vision": Stack("blocks", QWEN2_5_BLOCK),
    "qwen2_vl_vision": Stack("blocks", QWEN2_BLOCK),
    "qwen3_vl_vision": Stack("blocks", QWEN3_BLOCK),
    "siglip_vision_model": Stack("encoder.layers", CLIP_BLOCK),
    "smolvlm_vision": Stack("encoder.layers", CLIP_BLOCK),
}
