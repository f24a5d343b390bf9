"""Families of vision-language models, each described by a short file; see docs/add-a-family.md."""
