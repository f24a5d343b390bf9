import subprocess
import sys

import pytest
import torch

from qvlm_plugin.memory import peak_memory, restart_peak

SIZE = 300 * 2**20


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


@linux_only
def test_the_peak_restarts():
    restart_peak()
    before = peak_memory(on_gpu=False)
    large = torch.ones(SIZE, dtype=torch.uint8)
    reached = peak_memory(on_gpu=False)
    assert reached >= before + 0.9 * SIZE
    del large
    assert peak_memory(on_gpu=False) == pytest.approx(reached, abs=0.1 * SIZE)  # Linux counts pages in batches
    restart_peak()
    assert peak_memory(on_gpu=False) < before + 0.2 * SIZE


@linux_only
def test_the_parents_peak_is_not_counted():
    large = torch.ones(2 * SIZE, dtype=torch.uint8)
    own = peak_memory(on_gpu=False)
    script = "from qvlm_plugin.memory import peak_memory; print(peak_memory(on_gpu=False))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < own - 0.8 * large.numel()
