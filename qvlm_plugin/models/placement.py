"""Where a model's weights are: on one device, spread over several, offloaded by accelerate between uses, or nowhere.

Offloaded weights are meta tensors, except while the module that owns them runs: its hook brings them in.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import parse_flag_from_env
from accelerate.utils.modeling import has_offloaded_params
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.dtypes import DTYPES
from qvlm_plugin.reading import one_line


def default_device() -> torch.device:
    """The device of a model if none is given: the accelerator that torch finds, else the CPU.

    As in accelerate, ACCELERATE_USE_CPU=true in the environment means the CPU.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None or parse_flag_from_env("ACCELERATE_USE_CPU") else accelerator


def check_placement(dtype: str, device: str | torch.device) -> torch.device:
    """Check that a model can be loaded in a compute type to a device, before anything is read.

    Returns:
        The device.

    Raises:
        QVLMError: the compute type or the device is unknown, or this machine has no such device.
    """
    if dtype not in DTYPES:
        raise QVLMError(f"dtype={dtype!r} is not known; allowed are {', '.join(DTYPES)}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise QVLMError(f"device={device!r} is not a device; write cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise QVLMError(f"device={str(device)!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if found.type == "meta":
        raise QVLMError("device='meta' has no memory for weights; write cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch was built without it, or finds no such device
        raise QVLMError(f"device={str(device)!r} cannot be used here: {one_line(error)}") from error
    return found


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without weights: its parameters are on the meta device."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def is_offloaded(module: nn.Module) -> bool:
    """Whether some of the module's weights are offloaded at this moment."""
    return any(parameter.is_meta for parameter in module.parameters())


def execution_device(module: nn.Module) -> torch.device:
    """The device on which the module runs, even while its weights are offloaded; the first if there are several."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def device_name(device: torch.device) -> str:
    """The name of a GPU; for other devices, the type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """While active, the module's offloaded weights are on its device, and stay there after it has run."""
    offloaded = [part for part in module.modules() if has_offloaded_params(part)]
    loaded = []
    try:
        for part in offloaded:
            part._hf_hook.pre_forward(part)
            part._hf_hook.offload = False
            loaded.append(part)
        yield
    finally:
        for part in loaded:
            part._hf_hook.offload = True
            part._hf_hook.post_forward(part, None)


def place_like(module: nn.Module, original: nn.Module) -> None:
    """Place ``module`` as ``original`` is in a dispatched model: on the same device, or offloaded to the CPU."""
    hook = getattr(original, "_hf_hook", None)
    if isinstance(hook, AlignDevicesHook):
        placing = AlignDevicesHook(hook.execution_device, offload=hook.offload)
        placing.init_hook(module)
        # Not accelerate's add_hook_to_module: a module that it wraps refers to itself, and outlives its last use.
        module.register_forward_pre_hook(lambda module, args: placing.pre_forward(module, *args)[0])
        module.register_forward_hook(lambda module, args, output: placing.post_forward(module, output))
