"""Tiny random checkpoints in the layout of LLaVA's own code, with a tokenizer whose ids can be worked out by hand.

They have the file names, configuration keys and weight names of the released checkpoints; only the sizes are small.
"""

import json

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_format

_TEXT = """A chat between a curious user human and an artificial intelligence assistant The gives helpful detailed
polite answers to the questions USER ASSISTANT What is this it red"""
WORDS = tuple(_TEXT.split())
"""Words that are one token after a blank; all others are tokens letter by letter."""

VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14,
    "projection_dim": 16,
}  # fmt: skip


def write_sentencepiece(file, more=()):
    """A BPE model: <unk>, <s>, </s>, 256 bytes, the blank, printable ASCII, the pieces that make up `WORDS`, more."""
    model = sentencepiece_format.ModelProto()
    kinds = model.SentencePiece
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    grown = [f"▁{word[:length]}" for word in WORDS for length in range(1, len(word) + 1)]
    words = sorted(dict.fromkeys(grown), key=len)
    pieces += [(piece, kinds.NORMAL) for piece in dict.fromkeys((*letters, *words, *more))]
    for index, (piece, kind) in enumerate(pieces):
        score = float(-index) if kind == kinds.NORMAL else 0.0
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    file.write_bytes(model.SerializeToString())
    return len(pieces)


def random_weights(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise
    return weights


def llama_shapes(vocab, hidden, layers, heads, kv_heads, inner):
    head = hidden // heads
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for index in range(layers):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv_heads * head, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv_heads * head, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def tower_weights(image_size, seed):
    """The weights of a random CLIP vision tower, under the names ``vision_model.…`` that CLIP's files have."""
    shapes = {
        name: tensor.shape
        for name, tensor in CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=image_size)).state_dict().items()
    }
    return {
        f"vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in random_weights(shapes, seed).items()
    }


def write_tower(directory, image_size, seed):
    """Write the weights of a random CLIP model, of which LLaVA takes the vision tower."""
    weights = tower_weights(image_size, seed)
    weights["text_model.embeddings.token_embedding.weight"] = torch.ones(2, 2)
    torch.save(weights, directory / "pytorch_model.bin")


def write_original_llava(
    directory, *, projector=None, between=False, pads=False, image_size=28, tower_inside=False, shards=1,
    safetensors=False, seed=0, added_tokens=(), layers=2, legacy=True,
    more_pieces=(),
):  # fmt: skip
    """Write a checkpoint as LLaVA's code does.

    ``projector`` None is a linear one, as configurations before v1.5 leave it out; ``tower_inside`` puts the weights of
    a tower that was trained into the folder, else they are in the folder that ``mm_vision_tower`` names. ``legacy`` and
    ``more_pieces`` are the tokenizer's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    vocab = write_sentencepiece(directory / "tokenizer.model", more_pieces) + len(added_tokens)
    hidden, inner = 32, 64
    tower = directory / "tower"
    tower.mkdir(exist_ok=True)
    (tower / "config.json").write_text(
        json.dumps({"model_type": "clip_vision_model", **VISION, "image_size": image_size})
    )
    config = {
        "_name_or_path": "somewhere", "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16",
        "mm_vision_tower": "tower", "mm_hidden_size": VISION["hidden_size"], "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_use_im_start_end": between, "mm_use_im_patch_token": False,
        "use_mm_proj": True, "tune_mm_mlp_adapter": False,
    }  # fmt: skip
    if projector:
        config |= {"mm_projector_type": projector, "image_aspect_ratio": "pad" if pads else None}
    elif pads:
        config["image_aspect_ratio"] = "pad"
    shapes = llama_shapes(vocab, hidden, layers, 4, 2, inner)
    linears = {"": VISION["hidden_size"]} if not projector else {"0.": VISION["hidden_size"], "2.": hidden}
    for name, width in linears.items():
        shapes |= {f"model.mm_projector.{name}weight": (hidden, width), f"model.mm_projector.{name}bias": (hidden,)}
    weights = random_weights(shapes, seed)
    # Older versions of transformers stored this buffer.
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if tower_inside:
        inner = tower_weights(image_size, seed + 1)
        weights |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in inner.items()}
        config["unfreeze_mm_vision_tower"] = True
    else:
        write_tower(tower, image_size, seed + 1)
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer_files(directory, vocab, added_tokens, legacy)
    write_weights(directory, weights, shards, safetensors)
    return directory


def write_tokenizer_files(directory, vocab, added_tokens=(), legacy=True):
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "legacy": legacy,
                "model_max_length": 2048,
                "pad_token": None,
                "padding_side": "right",
                "tokenizer_class": "LlamaTokenizer",
                "unk_token": "<unk>",
            }
        )
    )
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"})
    )
    if added_tokens:
        first = vocab - len(added_tokens)
        (directory / "added_tokens.json").write_text(
            json.dumps({token: first + i for i, token in enumerate(added_tokens)})
        )


def write_weights(directory, weights, shards, safetensors):
    names = sorted(weights)
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    parts = [names[index::shards] for index in range(shards)]
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number:05}-of-{shards:05}.{suffix}"
        content = {name: weights[name] for name in part}
        if safetensors:
            save_file(content, directory / file, {"format": "pt"})
        else:
            torch.save(content, directory / file)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        name = f"{stem}.{suffix}.index.json"
        (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": index}))
