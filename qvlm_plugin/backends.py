"""The kernels that ``backend=`` names."""

from qvlm_plugin import plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.selftest import falling_back, insisting


def all_kernels() -> dict[str, Kernel]:
    """Every kernel by name, as they are: not tested."""
    return plugins.provided("kernel", Kernel, "qvlm_kernels")


def kernels(backend: str) -> tuple[Kernel, ...]:
    """The kernels that ``backend=`` names, in order of preference.

    ``reference`` is that kernel alone. All other backends end with it, to fall back on: ``packed`` begins with every
    other kernel, of which one that fails its self-test is an error; ``auto`` likewise, but does without those that
    fail; the name of a kernel stands for it alone, untested.

    Raises:
        QVLMError: there is none of that name.
    """
    known = all_kernels()
    reference = known["reference"]
    packed = tuple(kernel for kernel in known.values() if kernel is not reference)
    backends = {
        "auto": (*map(falling_back, packed), reference),
        "packed": (*map(insisting, packed), reference),
        **{kernel.name: (kernel, reference) for kernel in packed},
        "reference": (reference,),
    }
    if backend not in backends:
        raise QVLMError(f"backend={backend!r} is not known; allowed are {', '.join(backends)}")
    return backends[backend]
