"""Quantization methods: each fits a rounding plan to a model, one file each."""
