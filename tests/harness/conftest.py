"""Fixtures of the harness's tests."""

import pytest


@pytest.fixture(scope="module")
def make(tiny_llava):
    """Builds a wrapper on the tiny model."""
    from qvlm_plugin.harness.wrapper import QVLMChat

    return lambda cls=QVLMChat, **arguments: cls(
        **{"pretrained": str(tiny_llava), "dtype": "float32", "device": "cpu", **arguments}
    )
