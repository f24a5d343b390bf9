"""Language models, by ``config.text_config.model_type``."""

from qvlm_plugin.topology import Group, Stack

ATTENTION = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), producer="input_layernorm"),
    Group(("self_attn.o_proj",), producer="self_attn.v_proj"),
)
GATED_MLP = (
    Group(("mlp.gate_proj", "mlp.up_proj"), producer="post_attention_layernorm"),
    Group(("mlp.down_proj",), producer="mlp.up_proj"),
)
GATED_EXPERTS = (
    # The router and all experts read the norm, so that no scale of one expert can be folded into it.
    Group(("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    Group(("mlp.experts.*.down_proj",), producer="mlp.experts.*.up_proj"),
)
GEMMA_BLOCK = (
    # Gemma's norms multiply by 1 + weight, so that dividing the weight does not divide what they write.
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Group(("self_attn.o_proj",), producer="self_attn.v_proj"),
    Group(("mlp.gate_proj", "mlp.up_proj")),
    Group(("mlp.down_proj",), producer="mlp.up_proj"),
)

DENSE = Stack("layers", ATTENTION + GATED_MLP)
GEMMA = Stack("layers", GEMMA_BLOCK)

DECODERS = {
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "llama": DENSE,
    "mistral": DENSE,
    "moe_stablelm": Stack("layers", ATTENTION + GATED_MLP + GATED_EXPERTS, kept=("mlp.router",)),
    "qwen2": DENSE,
    "qwen2_5_vl_text": DENSE,
    "qwen2_vl_text": DENSE,
    "qwen3": DENSE,
    "qwen3_vl_text": DENSE,
}
