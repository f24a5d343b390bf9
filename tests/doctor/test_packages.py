from importlib import metadata

import pytest

from qvlm_plugin.doctor.packages import check_packages

REQUIRES = ["torch>=2", "pluggy>=999", 'nothing-of-this-name; extra == "nf"', 'pytest; extra == "report"']


@pytest.fixture
def required(monkeypatch):
    """What the package requires, as its metadata would say."""
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)


def test_unmet_requirements_fail_and_unmet_extras_warn(required):
    found = {finding.subject: finding for finding in check_packages()}
    assert found["qvlm_plugin"].status == "ok"
    assert found["packages"].status == "fail" and "pluggy" in found["packages"].message
    assert "needs >=999" in found["packages"].message and "torch" not in found["packages"].message
    assert found["extra 'nf'"].status == "warn" and "nothing-of-this-name missing" in found["extra 'nf'"].message
    assert found["extra 'nf'"].remedy == "pip install 'qvlm_plugin[nf]'"
    assert found["extra 'report'"].status == "ok" and "pytest" in found["extra 'report'"].message


def test_a_missing_package_is_reported(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    (finding,) = check_packages()
    assert finding.status == "fail" and finding.remedy == "pip install . in a checkout"
