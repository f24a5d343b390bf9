"""LLaVA checkpoints of real sizes with random weights, for measuring cost, not answers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from qvlm_plugin.models.prompts import chat_template, prompt_format

_PATCH = 14
"""Side of a patch in pixels."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
"""The tokenizer's first tokens."""

_DECODERS = {
    "llava-1.5-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "layers": 32},
    "llava-1.5-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "layers": 40},
    "demo": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
             "layers": 30},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "layers": 2},
}  # fmt: skip
_LARGE_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "image_size": 336}  # fmt: skip
_TOWERS = {
    "demo": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
             "image_size": 112},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "image_size": 336},
}  # fmt: skip
LAYOUTS = tuple(_DECODERS)
"""The layouts of LLaVA-1.5, one of the demo model's size, and a tiny one for trying a benchmark."""


def config_of(layout: str, layers: int | None = None) -> LlavaConfig:
    """The configuration of a layout, with another number of decoder layers if one is given."""
    sizes = dict(_DECODERS[layout])
    depth = sizes.pop("layers")
    tower = _TOWERS.get(layout, _LARGE_TOWER)
    return LlavaConfig(
        vision_config=CLIPVisionConfig(patch_size=_PATCH, projection_dim=768, **tower),
        text_config=LlamaConfig(
            vocab_size=32064, num_hidden_layers=layers or depth, max_position_embeddings=4096, **sizes
        ),
        image_token_index=_SPECIAL.index("<image>"),
        image_seq_length=(tower["image_size"] // _PATCH) ** 2,
    )


@torch.no_grad()
def random_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """A bfloat16 model whose matrices repeat a block of normal numbers, which takes seconds for a large model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(dtype)
    block = torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for name, parameter in model.named_parameters():
        flat = parameter.flatten()
        if parameter.dim() < 2:
            flat.fill_(0.0 if name.endswith("bias") else 1.0)
        for start in range(0, flat.numel() if parameter.dim() > 1 else 0, len(block)):
            flat[start : start + len(block)] = block[: flat.numel() - start]
    return model.eval()


def write_checkpoint(config: LlavaConfig, folder: Path) -> None:
    """Write a random model with a processor, in the Hugging Face layout."""
    random_model(config).save_pretrained(folder)
    size = config.vision_config.image_size
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        _tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(prompt_format("vicuna_v1")),
    ).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def request(config: LlavaConfig, tokens: int, seed: int = 0, count: int = 1) -> BatchFeature:
    """``count`` questions about images: ``tokens`` positions each, ``image_seq_length`` of them the image."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 30000, (count, tokens), generator=generator)
    ids[:, 1 : 1 + config.image_seq_length] = config.image_token_index
    size = config.vision_config.image_size
    pixels = torch.randn(count, 3, size, size, generator=generator)
    return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
