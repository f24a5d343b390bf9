"""Fixtures that many tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_llava import random_image, write_tiny_llava

from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.models.loading import load


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """The folder of a tiny LLaVA checkpoint."""
    return write_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture
def loaded(tiny_llava):
    """A freshly loaded tiny LLaVA."""
    return load(str(tiny_llava), dtype="float32")


@pytest.fixture
def calibration():
    """Five samples with images, one of them without."""
    samples = [
        Sample(Conversation.from_prompt(f"what is {index}?", [random_image(index)] if index else []), f"answer {index}")
        for index in range(5)
    ]
    return CalibrationSet(tuple(samples))
