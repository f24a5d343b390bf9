"""Compute types by name."""

AUTO = "auto"
"""The checkpoint's own type."""

DTYPES = (AUTO, "float32", "float16", "bfloat16")
"""The accepted names."""
