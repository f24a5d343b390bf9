"""The plugin manager, and look-up of methods, topologies and kernels that plugins provide."""

import logging
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from qvlm_plugin import builtin, hooks
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.families import MODEL_TYPES
from qvlm_plugin.methods.base import Method

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qvlm_plugin.models.loading import Checkpoint, LoadedModel
    from qvlm_plugin.plan import RoundingPlan
    from qvlm_plugin.topology import Topology

logger = logging.getLogger(__name__)


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The manager with the built-in plugin and those installed under the entry-point group ``qvlm_plugin``."""
    return create_manager(builtin, entry_points=True)


def create_manager(*plugins: ModuleType | object, entry_points: bool = False) -> pluggy.PluginManager:
    """A manager of the given plugins and, with ``entry_points``, of the installed ones."""
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    for plugin in plugins:
        manager.register(plugin)
    for entry in metadata.entry_points(group=hooks.PROJECT) if entry_points else ():
        name = f"{entry.name} of package {entry.dist.name}"
        try:
            manager.register(entry.load(), name)
        except Exception as error:  # another package may raise anything when it is imported
            if manager.has_plugin(name):
                manager.unregister(name=name)
            manager.register(_Broken(error), name)
    return manager


class _Broken:
    """Replaces an installed plugin that cannot be imported: its hooks raise the import's error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @hooks.hookimpl
    def qvlm_methods(self) -> None:
        """Raise the import's error."""
        raise self.error

    @hooks.hookimpl
    def qvlm_topology(self) -> None:
        """Raise the import's error."""
        raise self.error

    @hooks.hookimpl
    def qvlm_kernels(self) -> None:
        """Raise the import's error."""
        raise self.error


def methods() -> dict[str, Method]:
    """Every method by name."""
    return provided("method", Method, "qvlm_methods")


def method(name: str) -> Method:
    """The method named ``name``.

    Raises:
        QVLMError: there is none.
    """
    known = methods()
    if name not in known:
        raise QVLMError(f"method={name!r} is not known; allowed are {', '.join(sorted(known))}")
    return known[name]


def topology(config: "PretrainedConfig") -> "Topology":
    """The topology of models with this configuration, from the first plugin that has one; the built-in plugin is last.

    Raises:
        QVLMError: no plugin supports the family, or a plugin refuses the model.
    """
    for _, found in _ask("qvlm_topology", newest_first=True, config=config):
        if found is not None:
            return found
    raise QVLMError(
        f"model type {config.model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}, and what "
        "plugins describe (docs/add-a-family.md); topology=traced finds the parts of other models by running them"
    )


def topology_of(model: "Checkpoint | LoadedModel") -> "Topology":
    """The topology that was traced for a model, else the one that plugins describe.

    Raises:
        QVLMError: see `topology`.
    """
    return model.topology or topology(model.config)


def notify_quantized(loaded: "LoadedModel", plan: "RoundingPlan") -> None:
    """Tell every plugin that ``plan`` was applied to ``loaded``."""
    for _ in _ask("qvlm_quantized", loaded=loaded, plan=plan):
        pass


def _ask(hook: str, newest_first: bool = False, **arguments: Any) -> Iterator[tuple[str, Any]]:
    """The name and the answer of each plugin that has the hook, in the order of registration or the reverse.

    A plugin that raises is reported and skipped, but a `QVLMError` about a model is meant for the user and is raised.
    Hook wrappers are reported and skipped, too: they wrap the answers of all plugins, which are called one by one here.
    """
    implementations = getattr(plugin_manager().hook, hook).get_hookimpls()
    for implementation in reversed(implementations) if newest_first else implementations:
        name = implementation.plugin_name
        if implementation.wrapper or implementation.hookwrapper:
            _warn(f"plugin {name} is left out: its {hook} is a wrapper of other plugins' hooks, which is not supported")
            continue
        try:
            answer = implementation.function(*(arguments[key] for key in implementation.argnames))
        except Exception as error:  # another package may raise anything
            if isinstance(error, QVLMError) and arguments:
                raise
            _warn(f"plugin {name} is left out: {hook} raised {type(error).__name__}: {error}")
        else:
            yield name, answer


@cache
def _warn(message: str) -> None:
    """Log a warning about a plugin, once in a process. lmms-eval hides Python's warnings."""
    logger.warning(message)


def provided(kind: str, type_: type, hook: str) -> dict[str, Any]:
    """All objects of one kind that plugins provide, by name.

    Args:
        kind: the kind, for messages.
        type_: the type of the objects; anything else that a hook lists is reported and skipped.
        hook: the hook that lists them.

    Raises:
        QVLMError: two plugins provide the same name.
    """
    table: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for plugin, listed in _ask(hook):
        for entry in listed or ():
            if not isinstance(entry, type_):
                _warn(f"plugin {plugin}: {hook} must return a list of {type_.__name__}, not {entry!r}")
                continue
            if entry.name in table:
                both = f"{owners[entry.name]} and {plugin}"
                raise QVLMError(f"two plugins provide a {kind} named {entry.name!r}: {both}; uninstall one")
            table[entry.name], owners[entry.name] = entry, plugin
    return table
