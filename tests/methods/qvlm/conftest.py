import pytest
from tiny_llava import write_tiny_llava

from qvlm_plugin.models.loading import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("deep") / "model", layers=4)


@pytest.fixture
def deep(folder):
    return load(str(folder), dtype="float32")
