"""Checkpoints in, transformers models and processors out."""
