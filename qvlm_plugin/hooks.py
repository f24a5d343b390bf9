"""The hooks that provide methods, topologies and kernels, built-in ones and those of other packages alike.

A package that adds a method declares an entry point in group ``qvlm_plugin`` that names a module or object with
functions marked by `hookimpl`::

    from qvlm_plugin.hooks import hookimpl

    @hookimpl
    def qvlm_methods():
        return [Method(name="mine", …)]

A hook that raises is logged and left out, and so is a wrapper (``hookimpl(wrapper=True)``). docs/example-plugin is a
package with hooks, explained in docs/add-a-method.md.
"""

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qvlm_plugin.kernels.base import Kernel
    from qvlm_plugin.methods.base import Method
    from qvlm_plugin.models.loading import LoadedModel
    from qvlm_plugin.plan import RoundingPlan
    from qvlm_plugin.topology import Topology

PROJECT = "qvlm_plugin"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def qvlm_methods() -> "list[Method]":
    """Quantization methods to offer under ``method=``."""


@hookspec(firstresult=True)
def qvlm_topology(config: "PretrainedConfig") -> "Topology | None":
    """The topology of models with this configuration; None leaves it to the next plugin."""


@hookspec
def qvlm_kernels() -> "list[Kernel]":
    """Kernels to offer under ``backend=``."""


@hookspec
def qvlm_quantized(loaded: "LoadedModel", plan: "RoundingPlan") -> None:
    """Called after ``plan`` was applied to ``loaded``."""
