import sys

import pytest
import torch

from qvlm_plugin.memory import peak_memory, restart_peak

SIZE = 300 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak restarts on Linux only")
def test_a_peak_that_has_passed_is_forgotten():
    restart_peak()
    before = peak_memory(on_gpu=False)
    large = torch.ones(SIZE, dtype=torch.uint8)
    held = peak_memory(on_gpu=False)
    assert held >= before + 0.9 * SIZE
    del large
    assert peak_memory(on_gpu=False) == held
    restart_peak()
    assert peak_memory(on_gpu=False) < before + 0.2 * SIZE
