"""A tiny LLaVA with random weights in the Hugging Face layout, to check that everything runs."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ':' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def byte_tokenizer(*more_specials: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer with <pad>, <s>, </s>, <image>, more special tokens, and a token for each byte.

    Args:
        more_specials: further special tokens, in this order.
        named: special tokens that a processor accesses as attributes, as ``boi_token="<begin>"``.
    """
    specials = ["<pad>", "<s>", "</s>", "<image>", *more_specials]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
        padding_side="left",
        **named,
    )


def write_tiny_llava(
    directory: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    vision_hidden: int = 24,
    vision_layers: int = 3,
) -> Path:
    """Write a random LLaVA (CLIP tower, two-layer projector, grouped-query Llama) with a byte-level tokenizer.

    Args:
        directory: folder to write to, in float32; it is also returned.
        seed: seed of the weights.
        hidden, vision_hidden: widths of decoder and tower.
        layers, vision_layers: depth of decoder and tower.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden, intermediate_size=vision_hidden * 5 // 3, num_hidden_layers=vision_layers,
            num_attention_heads=2, image_size=28, patch_size=14, projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=3, vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=4,
    )  # fmt: skip
    model = randomized(LlavaForConditionalGeneration(config))
    model.save_pretrained(directory)
    llava_processor(tokenizer).save_pretrained(directory)
    return directory


def llava_processor(tokenizer: PreTrainedTokenizerFast, class_token: bool = True) -> LlavaProcessor:
    """A processor of images of 28 px in patches of 14.

    Args:
        tokenizer: a tokenizer with the image token.
        class_token: whether the tower has a class token, whose feature is left out.
    """
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default" if class_token else "full",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=int(class_token),
    )


@torch.no_grad()
def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Set random weights, large enough for outputs to depend on tokens and images."""
    for parameter in model.eval().parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=0.15)
    return model


def random_image(seed: int, size: int = 28) -> Image.Image:
    """A square RGB image of noise, ``size`` pixels a side."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
