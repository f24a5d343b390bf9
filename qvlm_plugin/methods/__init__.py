"""Quantization methods: presets of options, and one file for each step that searches part of a rounding plan."""
