"""Register quantized checkpoints and MoE-LLaVA for ``from_pretrained``, without importing transformers.

Each entry in transformers' tables needs one of its modules. If this module is already imported, the entry is made at
once; otherwise an import hook makes it when the module is imported.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def register() -> None:
    """Make the entries now, or when their modules are imported; further calls change nothing."""
    for name, enter in _ENTRIES.items():
        if name in sys.modules:
            enter()
        elif not any(isinstance(finder, _Registrar) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Registrar(name, enter))


class _Registrar(MetaPathFinder):
    """Finds one module by the other finders, and makes the entry after the module has been executed."""

    def __init__(self, name: str, enter: Callable[[], None]) -> None:
        self.name, self.enter = name, enter

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                self.enter()

            spec.loader.exec_module = execute_and_enter
        return spec


def _enter_quantizer() -> None:
    import_module("qvlm_plugin.hf_quantizer")  # may itself be importing transformers at this moment


def _enter_configuration() -> None:
    tables = import_module("transformers.models.auto.configuration_auto")
    ours = import_module("qvlm_plugin.models.moe_stablelm_config").MoEStableLmConfig
    tables.AutoConfig.register(ours.model_type, ours, exist_ok=True)


_ENTRIES = {
    "transformers.quantizers.auto": _enter_quantizer,
    # MoE-LLaVA is a LLaVA; before this module, transformers' StableLM cannot be imported.
    "transformers.models.llava.configuration_llava": _enter_configuration,
}
"""The function that makes each entry, by the module of transformers that it needs."""
