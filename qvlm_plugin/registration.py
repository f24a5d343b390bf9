"""Make ``from_pretrained`` know quantized checkpoints, without importing transformers for it.

transformers keeps its quantizers in the tables of one module. If that is there, ours are entered; otherwise the import
system is asked to do so when it comes.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Enter the quantizer now or when transformers is imported; repeating it changes nothing."""
    if _TABLES in sys.modules:
        _enter(sys.modules[_TABLES])
    elif not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registrar())


class _Registrar(MetaPathFinder):
    """Finds the module that holds the tables as the other finders do, and enters the quantizer once it has run."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = execute_and_enter
        return spec


def _enter(tables: ModuleType) -> None:
    ours = import_module("qvlm_plugin.hf_quantizer")
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(ours.QUANT_METHOD, ours.QVLMQuantizationConfig)
    tables.AUTO_QUANTIZER_MAPPING.setdefault(ours.QUANT_METHOD, ours.QVLMHfQuantizer)
