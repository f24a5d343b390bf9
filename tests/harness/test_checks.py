"""Each state of the host that `qvlm doctor` tells apart."""

from importlib import metadata

import datasets
import pytest
from harness.mirrors import write_mirrors

from qvlm_plugin.harness import checks


class Entry:
    """An entry point of another package."""

    name = "other"
    dist = type("Distribution", (), {"name": "other-package"})

    def load(self):
        raise ImportError("no module named else")


def test_this_installation_is_seen():
    (finding,) = checks.check_registration()
    assert finding.status == "ok" and "qvlm_llava" in finding.message


@pytest.mark.parametrize(("visible", "status"), [(True, "warn"), (False, "fail")])
def test_a_broken_plugin_of_another_package_is_named(monkeypatch, visible, status):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry()])
    monkeypatch.setattr(checks, "list_available_models", lambda: ["qvlm", "qvlm_llava"] if visible else [])
    finding = checks.check_registration()[-1]
    assert (
        finding.status == status and "entry point other of package other-package raises ImportError" in finding.message
    )
    assert finding.remedy == "pip uninstall other-package"


def test_a_missing_entry_point_is_reported(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(checks, "list_available_models", lambda: [])
    (finding,) = checks.check_registration()
    assert finding.status == "fail" and "pip install" in finding.remedy


def test_tasks_and_their_data(monkeypatch, tmp_path):
    monkeypatch.chdir(write_mirrors(tmp_path))
    tasks, local, absent, unknown = checks.check_tasks(["scienceqa", "pope", "no_such_task"])
    assert tasks.status == "ok" and "qvlm_scienceqa_lepa" in tasks.message
    assert local.status == "ok" and "stand-in data" in local.message
    assert unknown.status == "fail" and "no such task" in unknown.message
    assert absent.status == "fail" and "HF_HUB_OFFLINE is set" in absent.message and "network" in absent.remedy
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert checks.check_tasks(["pope"])[1].status == "warn"
