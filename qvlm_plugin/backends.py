"""The kernels of each ``backend=``."""

from qvlm_plugin import plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.selftest import required_to_pass, skipped_on_failure


def all_kernels() -> dict[str, Kernel]:
    """Every kernel by name, without self-tests."""
    return plugins.provided("kernel", Kernel, "qvlm_kernels")


def kernels(backend: str) -> tuple[Kernel, ...]:
    """The kernels of a backend, in order of preference.

    ``reference`` is the reference kernel alone; every other backend ends with it as the fallback. ``packed`` has all
    other kernels, and a kernel that fails its self-test is an error; ``auto`` has them too, and skips kernels that
    fail. The name of a kernel selects that kernel alone, without a self-test.

    Raises:
        QVLMError: there is no backend of that name.
    """
    known = all_kernels()
    reference = known["reference"]
    packed = tuple(kernel for kernel in known.values() if kernel is not reference)
    backends = {
        "auto": (*map(skipped_on_failure, packed), reference),
        "packed": (*map(required_to_pass, packed), reference),
        **{kernel.name: (kernel, reference) for kernel in packed},
        "reference": (reference,),
    }
    if backend not in backends:
        raise QVLMError(f"backend={backend!r} is not known; allowed are {', '.join(backends)}")
    return backends[backend]
