from dataclasses import replace

import pytest

from qvlm_plugin import backends
from qvlm_plugin.doctor.kernels import check_kernels
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.reference import REFERENCE


@pytest.fixture
def findings(monkeypatch):
    wrong = replace(INT8, name="wrong", forward=lambda *arguments: 2 * INT8.forward(*arguments))
    absent = replace(INT4, name="absent", obstacle=lambda *problem: "it is not installed")
    kernels = {kernel.name: kernel for kernel in (REFERENCE, INT4, wrong, absent)}
    monkeypatch.setattr(backends, "all_kernels", lambda: kernels)
    return {finding.subject: finding for finding in check_kernels()}


def test_every_packed_kernel_is_tested_on_the_cpu(findings):
    assert {"kernel int4 on cpu", "kernel wrong on cpu", "kernel absent on cpu"} <= findings.keys()
    assert not any("reference" in subject for subject in findings)
    assert findings["kernel int4 on cpu"].status == "ok"


def test_a_wrong_kernel_and_one_that_cannot_run_are_reported(findings):
    wrong, absent = findings["kernel wrong on cpu"], findings["kernel absent on cpu"]
    assert wrong.status == "warn" and "self-test failed" in wrong.message and "backend=auto" in wrong.remedy
    assert absent.status == "warn" and absent.message == "cannot run: it is not installed"


def test_the_package_has_a_format_for_each_of_its_kernels_on_the_cpu():
    found = {finding.subject: finding for finding in check_kernels()}
    assert len(found) >= 5 and "kernel int4_codes on cpu" in found
    assert {subject for subject, finding in found.items() if finding.status != "ok"} == set()
