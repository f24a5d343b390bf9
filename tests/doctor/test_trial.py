"""Trial runs that fail; the one that succeeds is part of `commands/test_doctor`."""

import re
import tempfile
from pathlib import Path

import pytest
from doctor.overlay import write_package
from report.stub_harness import write_stub

from qvlm_plugin.doctor.trial import check_trial


@pytest.fixture
def overlay(tmp_path, monkeypatch):
    """A folder whose packages come first here and, by a relative name, in the trial's process."""
    folder = tmp_path / "overlay"
    folder.mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "overlay")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["filelock>=3.13,<4.3"])
    return folder


def failure(tmp_path):
    """The finding, and the log that it names, which is all that is left."""
    (finding,) = check_trial()
    assert finding.status == "fail"
    log = Path(re.search(r"; log: (\S+\.log)$", finding.message)[1])
    assert [*(tmp_path / "temporary").iterdir()] == [log]
    return finding, log.read_text()


def test_a_package_that_lost_a_module_is_named_with_its_version_and_the_remedy(overlay, tmp_path):
    write_package(overlay, "filelock", "4.3.1")
    (overlay / "lmms_eval.py").write_text("import filelock._api")
    finding, log = failure(tmp_path)
    assert finding.message.startswith("ModuleNotFoundError: No module named 'filelock._api' (filelock 4.3.1); log: ")
    assert finding.remedy == "pip install 'filelock>=3.13,<4.3'" and "Traceback" in log


def test_results_of_other_documents_are_no_success(overlay, tmp_path):
    write_stub(overlay)
    finding, log = failure(tmp_path)
    assert finding.message.startswith("the results lack documents") and "loading" in log
