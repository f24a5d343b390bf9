import json
import subprocess
import sys

import pytest
import torch

from qvlm_plugin.memory import peak_memory

SIZE = 300 * 2**20

# In a process of its own: where earlier tests have freed and trimmed memory, the C library takes the large tensor from
# its heap and keeps the pages when the tensor is freed.
SCRIPT = f"""
import json
import torch
from qvlm_plugin.memory import peak_memory, restart_peak

peaks = {{"start": peak_memory(on_gpu=False)}}
restart_peak()
peaks["before"] = peak_memory(on_gpu=False)
large = torch.ones({SIZE}, dtype=torch.uint8)
peaks["reached"] = peak_memory(on_gpu=False)
del large
peaks["freed"] = peak_memory(on_gpu=False)
restart_peak()
peaks["after"] = peak_memory(on_gpu=False)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_the_peak_restarts_and_the_parents_is_not_counted():
    large = torch.ones(2 * SIZE, dtype=torch.uint8)
    own = peak_memory(on_gpu=False)
    child = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    peaks = json.loads(child.stdout)
    assert 0 < peaks["start"] < own - 0.8 * large.numel()
    assert peaks["reached"] >= peaks["before"] + 0.9 * SIZE
    assert peaks["freed"] == pytest.approx(peaks["reached"], abs=0.1 * SIZE)  # Linux counts pages in batches
    assert peaks["after"] < peaks["before"] + 0.2 * SIZE
