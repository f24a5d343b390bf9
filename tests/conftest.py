"""Fixtures that many tests share."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"  # read when torch and the hub's client are imported

import pytest
import warm
from tiny_llava import random_image, write_tiny_llava

from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.models.loading import load


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """The folder of a tiny LLaVA checkpoint."""
    return write_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A folder with `python`, `lmms-eval` and `qvlm` that start at once; see `warm`."""
    own = tmp_path_factory.getbasetemp()
    with warm.programs((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "programs") as folder:
        yield folder


@pytest.fixture
def warm_python(programs, monkeypatch):
    """Lets processes that are started with ``sys.executable`` start at once."""
    monkeypatch.setattr(sys, "executable", str(programs / "python"))


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
