"""A stub of the harness for what runs it."""

import pytest
from report.stub_harness import write_stub

from qvlm_plugin.report.runs import Setting


@pytest.fixture
def place(tmp_path):
    return write_stub(tmp_path / "place")


@pytest.fixture
def setting(place, tmp_path):
    return Setting(tmp_path / "runs", place)
