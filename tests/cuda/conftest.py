import pytest
from emulated_cuda import EmulatedCUDA


@pytest.fixture
def cuda():
    """Emulated devices cuda:0 and cuda:1."""
    with EmulatedCUDA() as devices:
        yield devices
