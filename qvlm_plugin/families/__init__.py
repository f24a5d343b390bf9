"""Families of vision-language models, each described by a short file; see docs/add-a-family.md."""

MODEL_TYPES = ("llava", "llava_next", "llava_onevision")
"""How configurations of transformers name them."""
