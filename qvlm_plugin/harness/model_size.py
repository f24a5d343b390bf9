"""Sizes of a model in bytes: its weights in memory, its weights packed by the scheme, and peak memory."""

import math
from typing import Any

from torch import nn

from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.memory import peak_memory
from qvlm_plugin.scheme import UNQUANTIZED
from qvlm_plugin.stored_bits import stored_linears


def memory(model: nn.Module) -> dict[str, Any]:
    """Bytes of the model's parameters and buffers (shared storage once), and the process's peak memory.

    With the reference arithmetic weights are rounded but not packed; ``packed_bytes`` is their packed size.
    """
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    sizes = {"weight_bytes": sum(storages.values()), "packed_bytes": packed_bytes(model)}
    gpu = on_gpu(model)
    return sizes | {"peak_memory_bytes": peak_memory(gpu), "peak_memory_of": "cuda" if gpu else "process"}


def on_gpu(model: nn.Module) -> bool:
    """Whether any part of the model is on a GPU; peak memory is then that of the GPUs."""
    return any(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))


def packed_bytes(model: nn.Module) -> int:
    """Size of the model: quantized weights in their formats, scales included, and everything else in 16 bits.

    It depends on the scheme only, not on a run's compute type or kernels. Shared parameters count once.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    bits = sum(layer.weight_format.effective_bits(layer.shape) * math.prod(layer.shape) for layer in layers)
    counted = {id(getattr(layer, name)) for layer in layers for name in layer.tensor_names if name != "bias"}
    for name, stored in stored_linears(model).items():
        if stored.bits < UNQUANTIZED:  # another program quantized it
            bits += stored.weight * stored.elements
            module = model.get_submodule(name)
            counted |= {id(tensor) for own, tensor in module.named_parameters(recurse=False) if own != "bias"}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in counted]
    return round((bits + sum(min(8 * tensor.element_size(), 16) * tensor.numel() for tensor in rest)) / 8)
