import pytest
import torch

from qvlm_plugin.doctor.arithmetic import INSTRUCTIONS, check_arithmetic

X86, ARM = dict.fromkeys(INSTRUCTIONS[:3], False), dict.fromkeys(INSTRUCTIONS[3:], False)


@pytest.mark.parametrize("capabilities", [X86, ARM])
def test_only_a_cpu_without_bfloat16_and_no_gpu_are_warned_about(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    (finding,) = check_arithmetic()
    assert finding.status == "warn" and "dtype=float32" in finding.remedy
    for name in capabilities:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: capabilities | {name: True})
        assert not check_arithmetic()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not check_arithmetic()


def test_unknown_capabilities_give_no_finding(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "other"}, raising=False)
    assert not check_arithmetic()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not check_arithmetic()
