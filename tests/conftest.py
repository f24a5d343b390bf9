"""Fixtures that many tests share."""

import gc
import importlib
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"  # read when torch and the hub's client are imported

import pytest
import warm
from hypothesis import HealthCheck, Phase, settings

# Fixtures import what is heavy: the process that only hands tests to the workers does without.

# How many hostile inputs and kills there are: a fixed few in the suite, many and ever new ones with `make fuzz`.
settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, max_examples=40, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.register_profile("fuzz", settings.get_profile("suite"), derandomize=False, max_examples=1_500, print_blob=True)
settings.load_profile("suite")


def pytest_collection_finish():
    """Spare the garbage collector the packages that are imported by now: it would take a second to visit them."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """The folder of a tiny LLaVA checkpoint."""
    from tiny_llava import write_tiny_llava

    return write_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all workers of pytest-xdist have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def programs(shared):
    """A folder with `python`, `lmms-eval` and `qvlm` that start at once; see `warm`."""
    with warm.programs(shared / "programs") as folder:
        yield folder


@pytest.fixture
def warm_python(programs, monkeypatch):
    """Lets processes that are started with ``sys.executable`` start at once."""
    monkeypatch.setattr(sys, "executable", str(programs / "python"))


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a script of ``benchmarks/`` by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def loaded(tiny_llava):
    """A freshly loaded tiny LLaVA."""
    from qvlm_plugin.models.loading import load

    return load(str(tiny_llava), dtype="float32")


@pytest.fixture
def calibration():
    """Five samples with images, one of them without."""
    from tiny_llava import random_image

    from qvlm_plugin.calibration import CalibrationSet, Sample
    from qvlm_plugin.conversation import Conversation

    samples = [
        Sample(Conversation.from_prompt(f"what is {index}?", [random_image(index)] if index else []), f"answer {index}")
        for index in range(5)
    ]
    return CalibrationSet(tuple(samples))
