"""A tiny random MoE-LLaVA-StableLM checkpoint in the layout of its authors' code."""

import base64
import json

from original_llava import VISION, random_weights, tower_weights, write_tower, write_weights

HIDDEN, INNER, HEADS, LAYERS, EXPERTS = 32, 48, 4, 3, 4
MERGED = (" is", " this", " the", "the", "What", " USER", " ASSISTANT", "ser", " and", " red")


def write_arcade100k(file):
    """Ranks of the 256 bytes and of the beginnings of some words; returns how many."""
    tokens = [bytes([byte]) for byte in range(256)]
    grown = [word[:length].encode() for word in MERGED for length in range(2, len(word) + 1)]
    tokens += sorted(dict.fromkeys(grown), key=len)
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return len(tokens)


def write_moe_llava(directory, *, seed=0, spare=10):
    """Write MoE-LLaVA-StableLM: experts in every second layer, spare vocabulary.

    The folder holds a tower, as the released one does, and the named one is used; they differ here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    vocab = write_arcade100k(directory / "arcade100k.tiktoken") + 33 + spare
    tower = directory / "tower"
    tower.mkdir(exist_ok=True)
    (tower / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **VISION, "image_size": 42}))
    sparse = list(range(LAYERS))[::2]
    config = {
        "architectures": ["MoELLaVAStablelmForCausalLM"], "model_type": "moe_llava_stablelm", "vocab_size": vocab,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "hidden_act": "silu", "norm_eps": 1e-5, "rope_pct": 0.25, "rope_theta": 10000,
        "use_qkv_bias": True, "max_position_embeddings": 512, "bos_token_id": 100257, "eos_token_id": 100257,
        "tie_word_embeddings": False, "torch_dtype": "float16", "image_aspect_ratio": "pad",
        "image_projector_type": "mlp2x_gelu", "mm_hidden_size": VISION["hidden_size"], "mm_image_tower": "tower",
        "mm_video_tower": None, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
        "moe": {
            "moe_enable": True, "moe_mode": "sparse", "moe_layers_idx": sparse, "num_experts": [EXPERTS] * len(sparse),
            "ep_size": 1, "top_k_experts": 2, "capacity_factor": 1.5, "eval_capacity_factor": 2.0, "min_capacity": 0,
            "use_residual": False, "router_aux_loss_coef": 0.01, "train_modules": [],
        },
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Arcade100kTokenizer"}))
    weights = random_weights(stablelm_shapes(vocab, sparse), seed)
    weights |= {f"model.image_tower.image_tower.{name}": one for name, one in tower_weights(42, seed + 2).items()}
    write_tower(tower, 42, seed + 1)
    write_weights(directory, weights, 2, False)
    return directory


def stablelm_shapes(vocab, sparse):
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN), "lm_head.weight": (vocab, HIDDEN)}
    norms = ["model.norm"]
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        for name in "qkv":
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (HIDDEN,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        owners = [f"{layer}.mlp"]
        if index in sparse:
            shapes[f"{layer}.mlp.deepspeed_moe.gate.wg.weight"] = (EXPERTS, HIDDEN)
            owners = [f"{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}" for expert in range(EXPERTS)]
        for owner in owners:
            shapes |= {f"{owner}.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
            shapes[f"{owner}.down_proj.weight"] = (HIDDEN, INNER)
    for norm in norms:
        shapes |= {f"{norm}.weight": (HIDDEN,), f"{norm}.bias": (HIDDEN,)}
    for name, width in {"0": VISION["hidden_size"], "2": HIDDEN}.items():
        projector = f"model.mm_projector.image_spatial_proj.{name}"
        shapes |= {f"{projector}.weight": (HIDDEN, width), f"{projector}.bias": (HIDDEN,)}
    return shapes
