"""Tiny random checkpoints of the other families in the Hugging Face layout: LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL."""

import torch
from tiny_llava import CHAT_TEMPLATE, byte_tokenizer, randomized
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
)

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GRID = [[28, 56], [56, 28], [56, 56]]


def write_tiny_llava_next(directory, seed=0):
    """Crops of 28 px in a grid that follows the image's shape, a newline token after each row of features."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=3,
        image_grid_pinpoints=GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=GRID
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _save(directory, LlavaNextForConditionalGeneration(config), processor)


def write_tiny_llava_onevision(directory, seed=0):
    """A SigLIP tower whose last layer is read whole, and Qwen2."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer("<video>")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=GRID)
    processor = LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}), num_image_tokens=4,
        vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return _save(directory, LlavaOnevisionForConditionalGeneration(config), processor)


def write_tiny_qwen2_5_vl(directory, seed=0):
    """A family that the package does not know: other names, other attention, a projector inside the tower."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
            "fullatt_block_indexes": [1], "hidden_act": "silu",
        },
        text_config={**text, "vocab_size": len(tokenizer)},
        image_token_id=4, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    )
    template = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    return _save(directory, Qwen2_5_VLForConditionalGeneration(config), processor)


def _save(directory, model, processor):
    randomized(model).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
