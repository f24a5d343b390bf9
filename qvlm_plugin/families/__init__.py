"""Families of vision-language models, each described by a short file; see docs/add-a-family.md."""

MODEL_TYPES = (
    "gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma", "qwen2_5_vl",
    "qwen2_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
"""The families' names in transformers' configurations; `qvlm_plugin.families.described` has their descriptions."""
