"""Tiny random checkpoints of the other families in the Hugging Face layout."""

import json
import shutil

import seer
import torch
from seer import Seer, SeerConfig
from tiny_llava import CHAT_TEMPLATE, byte_tokenizer, llava_processor, randomized
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PixtralImageProcessorPil,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
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


def write_tiny_vip_llava(directory, seed=0):
    """A family that the package does not know: features of two layers side by side, a norm in the projector."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION | {"num_hidden_layers": 2}, projection_dim=16),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=3,
        vision_feature_layers=[-1, -2],  # transformers 5.18 knows no other name; newer versions take both
        image_seq_length=4,
    )
    return _save(directory, VipLlavaForConditionalGeneration(config), llava_processor(tokenizer))


def write_tiny_seer(directory, seed=0):
    """A family of which transformers knows nothing: its code, of `seer`, comes with the checkpoint."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    vision = {**VISION, "num_hidden_layers": 2, "is_native": True}
    config = SeerConfig(vision, {**TEXT, "vocab_size": len(tokenizer), "tie_word_embeddings": False}, image_token_id=3)
    _save(directory, Seer(config), llava_processor(tokenizer, class_token=False))
    shutil.copy(seer.__file__, directory / "seer.py")
    config = json.loads((directory / "config.json").read_text())
    code = {"AutoConfig": "seer.SeerConfig", "AutoModelForImageTextToText": "seer.Seer"}
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    return directory


SMALL = VISION | {"num_hidden_layers": 2, "patch_size": 7}
"""Towers of 16 patches, all of whose blocks are used."""


def write_tiny_aya_vision(directory, seed=0):
    """Another family that the package does not know: attention and MLP of a decoder layer read the same norm."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL")
    config = AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", **SMALL, "vision_use_head": False},
        text_config={"model_type": "cohere2", "vocab_size": len(tokenizer), **TEXT, "head_dim": 8},
        image_token_index=6,
        downsample_factor=2,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=3, crop_to_patches=True)
    processor = AyaVisionProcessor(
        images, tokenizer, patch_size=7, img_size=28, downsample_factor=2, chat_template=CHAT_TEMPLATE
    )
    return _save(directory, AyaVisionForConditionalGeneration(config), processor)


def write_tiny_idefics3(directory, seed=0):
    """Crops of 28 px and the whole image, four patches of each in one token; names of rows and columns are text."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer("<fake_token_around_image>", "<end_of_utterance>")
    config = Idefics3Config(
        vision_config=SMALL,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=3,
        scale_factor=2,
        pad_token_id=0,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    return _save(directory, Idefics3ForConditionalGeneration(config), processor)


def write_tiny_smolvlm(directory, seed=0):
    """As Idefics3, with a processor for videos; it asks for the package num2words."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>")
    config = SmolVLMConfig(
        vision_config=SMALL,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=3,
        scale_factor=2,
        pad_token_id=0,
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    videos = SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28})
    processor = SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    return _save(directory, SmolVLMForConditionalGeneration(config), processor)


QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_IDS = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7}
QWEN_TOWER = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN_TEXT = TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}


def write_tiny_qwen2_vl(directory, seed=0):
    """Images in their own size, positions of three axes."""
    tower = QWEN_TOWER | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return _write_qwen(directory, seed, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, tower)


def write_tiny_qwen2_5_vl(directory, seed=0):
    """A tower whose first block attends within windows, its second to the whole image."""
    tower = QWEN_TOWER | {
        "intermediate_size": 24, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1],
        "hidden_act": "silu",
    }  # fmt: skip
    kinds = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    return _write_qwen(directory, seed, *kinds, tower)


def write_tiny_qwen3_vl(directory, seed=0):
    """Two more projectors, whose features are added before the second and the third decoder layer."""
    tower = QWEN_TOWER | {
        "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    kinds = Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    return _write_qwen(directory, seed, *kinds, tower, head_dim=8, num_hidden_layers=3)


def write_tiny_qwen3_vl_moe(directory, seed=0):
    """Experts that are kept together in one Parameter, which are not supported."""
    tower = QWEN_TOWER | {
        "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    kinds = Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, Qwen3VLProcessor
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return _write_qwen(directory, seed, *kinds, tower, head_dim=8, **experts)


def _write_qwen(directory, seed, kind, model, processor, tower, **text):
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(*QWEN_TOKENS)
    config = kind(vision_config=tower, text_config={**QWEN_TEXT, "vocab_size": len(tokenizer), **text}, **QWEN_IDS)
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    images = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size)
    videos = Qwen3VLVideoProcessor() if "3" in kind.model_type else Qwen2VLVideoProcessor()
    template = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    return _save(directory, model(config), processor(images, tokenizer, videos, chat_template=template))


def write_tiny_internvl(directory, seed=0):
    """Crops of 28 px and a thumbnail; a norm before the projector, scales after attention and MLP."""
    torch.manual_seed(seed)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = byte_tokenizer(*names.values(), "<video>", **names, video_token="<video>")
    config = InternVLConfig(
        vision_config={**SMALL, "image_size": [28, 28], "patch_size": [7, 7], "layer_scale_init_value": 0.5},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=6,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=3, crop_to_patches=True)
    videos = InternVLVideoProcessor(size={"height": 28, "width": 28})
    template = CHAT_TEMPLATE.replace("<image>", "<IMG_CONTEXT>\n")
    processor = InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=template)
    return _save(directory, InternVLForConditionalGeneration(config), processor)


GEMMA_TEXT = TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
"""A window that is shorter than prompts."""
GEMMA_LAYERS = ["sliding_attention", "full_attention"]


def write_tiny_paligemma2(directory, seed=0):
    """Gemma 2, without a chat template: as released."""
    torch.manual_seed(seed)
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    tokenizer = byte_tokenizer()
    processor = PaliGemmaProcessor(images, tokenizer)  # which adds a thousand tokens
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **SMALL, "vision_use_head": False},
        text_config={"model_type": "gemma2", "vocab_size": len(tokenizer), **GEMMA_TEXT},
        image_token_index=3,
        projection_dim=32,
        hidden_size=32,
    )
    return _save(directory, PaliGemmaForConditionalGeneration(config), processor)


def write_tiny_gemma3(directory, seed=0):
    """A layer that attends within a window and one that does not; a projector without a Linear."""
    torch.manual_seed(seed)
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = byte_tokenizer(*names.values(), **names, image_token="<image>")
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **SMALL, "vision_use_head": False},
        text_config={
            **GEMMA_TEXT,
            "vocab_size": len(tokenizer),
            "layer_types": ["sliding_attention", "full_attention"],
        },
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
        mm_tokens_per_image=4,
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = CHAT_TEMPLATE.replace("<image>", "<start_of_image>")
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)
    return _save(directory, Gemma3ForConditionalGeneration(config), processor)


def write_tiny_mistral3(directory, seed=0):
    """Pixtral's tower: images in their own size, one after the other in one row of patches."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = Mistral3Config(
        vision_config={"model_type": "pixtral", **SMALL, "image_size": 56},
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), **TEXT, "head_dim": 8},
        image_token_index=4,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return _save(directory, Mistral3ForConditionalGeneration(config), _pixtral_processor(tokenizer, merge=2))


def write_tiny_pixtral(directory, seed=0):
    """A LLaVA with Pixtral's tower."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = LlavaConfig(
        vision_config={"model_type": "pixtral", **SMALL, "image_size": 56},
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), **TEXT, "head_dim": 8},
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _save(directory, LlavaForConditionalGeneration(config), _pixtral_processor(tokenizer, merge=1))


def _pixtral_processor(tokenizer, merge):
    images = PixtralImageProcessorPil(size={"longest_edge": 42}, patch_size={"height": 7, "width": 7})
    template = CHAT_TEMPLATE.replace("<image>", "[IMG]")
    return PixtralProcessor(images, tokenizer, patch_size=7, spatial_merge_size=merge, chat_template=template)


def _save(directory, model, processor):
    randomized(model).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
