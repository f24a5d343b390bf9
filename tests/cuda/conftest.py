import pytest
from emulated_cuda import EmulatedCUDA

from qvlm_plugin.kernels import fusable, fused, selftest


@pytest.fixture
def cuda(forgetful):
    """Emulated devices cuda:0 and cuda:1, too old for Triton, whose interpreter is slow."""
    with EmulatedCUDA(capability=(7, 5)) as devices:
        yield devices


@pytest.fixture
def triton_cuda(forgetful):
    """Emulated devices with Triton's kernels."""
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
