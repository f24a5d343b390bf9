"""The plugin manager: what the hooks provide, looked up by name."""

from functools import cache
from types import ModuleType

import pluggy
from transformers import PretrainedConfig

from qvlm_plugin import builtin, hooks
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.families.llava import MODEL_TYPES
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.selftest import falling_back, insisting
from qvlm_plugin.methods.base import Method
from qvlm_plugin.topology import Topology


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The manager with the built-in plugin and those installed under the entry-point group ``qvlm_plugin``."""
    return create_manager(builtin, entry_points=True)


def create_manager(*plugins: ModuleType | object, entry_points: bool = False) -> pluggy.PluginManager:
    """A manager of the given plugins, and of the installed ones when ``entry_points``."""
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    for plugin in plugins:
        manager.register(plugin)
    if entry_points:
        manager.load_setuptools_entrypoints(hooks.PROJECT)
    return manager


def methods() -> dict[str, Method]:
    """Every method by name."""
    return _by_name("method", plugin_manager().hook.qvlm_methods())


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        QVLMError: there is none.
    """
    known = methods()
    if name not in known:
        raise QVLMError(f"method={name!r} is not known; allowed are {', '.join(sorted(known))}")
    return known[name]


def kernels(backend: str) -> tuple[Kernel, ...]:
    """The kernels that ``backend=`` names, in order of preference.

    ``reference`` is that kernel alone. All other backends end with it, to fall back on: ``packed`` begins with every
    other kernel, of which one that fails its self-test is an error; ``auto`` likewise, but does without those that
    fail; the name of a kernel stands for it alone, untested.

    Raises:
        QVLMError: there is none of that name.
    """
    known = _by_name("kernel", plugin_manager().hook.qvlm_kernels())
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


def topology(config: PretrainedConfig) -> Topology:
    """The topology of models with this configuration.

    Raises:
        QVLMError: no plugin knows the family.
    """
    found = plugin_manager().hook.qvlm_topology(config=config)
    if found is None:
        raise QVLMError(
            f"model type {config.model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}, and what "
            "plugins describe (docs/add-a-family.md)"
        )
    return found


def _by_name(kind: str, results: list[list]) -> dict:
    table = {}
    for entry in (entry for provided in reversed(results) for entry in provided):  # in order of registration
        if entry.name in table:
            raise QVLMError(f"two plugins provide a {kind} named {entry.name!r}; uninstall one")
        table[entry.name] = entry
    return table
