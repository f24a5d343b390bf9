"""Arithmetics of a quantized Linear, one file each."""
