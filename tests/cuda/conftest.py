from importlib.util import find_spec

import pytest
from emulated_cuda import EmulatedCUDA

from qvlm_plugin.kernels import fusable, fused, selftest

collect_ignore = [] if find_spec("triton") else ["test_fused.py"]


@pytest.fixture
def cuda(forgetful):
    """Emulated devices cuda:0 and cuda:1, too old for Triton, whose interpreter is slow."""
    with EmulatedCUDA(capability=(7, 5)) as devices:
        yield devices


@pytest.fixture
def triton_cuda(forgetful):
    """Emulated devices with Triton's kernels."""
    if not pytest.importorskip("emulated_triton", reason="no Triton", exc_type=ImportError).CAN_BE_LEFT:
        pytest.skip("an older Triton")
    with EmulatedCUDA() as devices:
        yield devices


@pytest.fixture
def forgetful():
    """Forgets before and after a test what devices can do."""
    cached = (fused.has_kernels, fusable._passes, selftest.self_test)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()
