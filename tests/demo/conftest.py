"""The demo, assembled once for all tests that need the real one (its parts are fetched at first use)."""

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def demo_model(shared):
    """The folder of a fresh build."""
    from qvlm_plugin.demo.model import build

    with FileLock(shared / "demo-model.lock"):  # who comes second finds it built
        return build(shared / "demo-model")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """A folder with all mirrors and the calibration set."""
    from qvlm_plugin.demo.data import write_mirrors

    return write_mirrors(tmp_path_factory.mktemp("demo") / "data")
