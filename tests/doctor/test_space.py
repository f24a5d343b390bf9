import shutil
from collections import namedtuple

import psutil
import pytest
import torch

from qvlm_plugin.doctor.needs import Needs
from qvlm_plugin.doctor.space import HEADROOM, check_disk, check_memory, check_space
from qvlm_plugin.scheme import Scheme

NEEDS = Needs(full=10e9, packed=3e9)
Memory, Usage = namedtuple("Memory", "available"), namedtuple("Usage", "free")


@pytest.mark.parametrize(("free", "status"), [(11e9, "warn"), (13e9, "ok"), (3e9, "fail"), (4e9, "warn")])
def test_free_memory_decides(monkeypatch, free, status):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (finding,) = check_memory(NEEDS)
    assert finding.status == status and f"{10 * HEADROOM:.1f} GB for backend=reference" in finding.message
    assert bool(finding.remedy) == (status != "ok")


def test_a_gpu_with_space_for_packed_weights_only_gets_its_own_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (5e9, 6e9))
    gpu = check_memory(NEEDS)[1]
    assert gpu.subject == "memory of cuda:0" and gpu.status == "warn" and "--device_map offload" in gpu.remedy


def test_free_disk_decides(monkeypatch, tmp_path):
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(5e9))
    plans, checkpoints = check_disk(NEEDS, download=True)
    assert plans.status == "ok" and str(tmp_path / "not") in plans.message
    assert checkpoints.status == "fail" and "HF_HOME" in checkpoints.remedy
    assert check_disk(NEEDS, download=False) == [plans]


def test_a_checkpoint_that_cannot_be_used_is_a_finding():
    first, *rest = check_space({"pretrained": "/absent"}, Scheme.parse("w4a4"))
    assert first.status == "fail" and "no such folder" in first.message and len(rest) >= 2
