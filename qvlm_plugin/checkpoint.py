"""Quantized checkpoints: a Hugging Face folder whose Linears are stored as kernels' neutral tensors.

The folder's config.json also has a ``quantization_config``: the plan's facts and table, the kernel and tensors of each
module, and the hashes of the weight files.

Without this package, transformers would take the folder for a checkpoint in full precision. Two things prevent this.
The configuration's entry for the weight file (``transformers_weights``) is a sentence, which ends the error message;
with this package, `hf_quantizer` removes the entry before transformers looks for the file. And every quantized Linear
has a flat tensor ``weight`` in the file, empty if its kernel has no tensor of this name: a loader expects a matrix
there and stops. Without the tensor, it would fill the layer with random numbers.
"""

import hashlib
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from qvlm_plugin import backends
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.selection import Choice, Execution
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.memory import trim_heap
from qvlm_plugin.plan import factors_of, share_within_sites
from qvlm_plugin.plan_header import ModulePlan, Rotation, table_hash
from qvlm_plugin.reading import inside, parsed_elsewhere

FORMAT_VERSION = 3
"""The newest format that this version reads. A folder has the format of its plan, the oldest that can represent it."""

NOTICE_KEY, NOTICE = "transformers_weights", "this checkpoint is quantized; what loads it: pip install qvlm_plugin"
"""An entry of config.json that makes loading fail without this package."""

_GUARD = "weight"

ROTATION_SCALE = "rotation_scale"
"""Name of the stored tensor by which inputs are divided before they are rotated: float32 [I]."""

_MOST_ELEMENTS = 2**48
"""Largest number of elements of a stored tensor; with more, sizes in bytes could overflow."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class StoredModule(_Record):
    """One Linear of the model.

    Attributes:
        plan: its entry in the plan.
        kernel: the kernel whose neutral tensors are stored; None for a Linear that is not quantized.
        rotation: the rotation of its inputs; the stored weight is already rotated.
        tensors: dtype and shape of each stored tensor by name, as ``uint8[64,128]``.
        refused: for a module that fell back, the kernels that could not run it, with their reasons.
    """

    plan: ModulePlan
    kernel: str | None = None
    rotation: Rotation | None = None
    tensors: Mapping[str, str] = Field(default_factory=dict)
    refused: Mapping[str, str] = Field(default_factory=dict)


class CheckpointRecord(_Record):
    """The ``quantization_config`` of a quantized checkpoint.

    Attributes:
        format_version: version of this layout.
        package_version: version of the package that wrote it.
        backend: the backend from which kernels were chosen.
        model: fingerprint of the checkpoint that was quantized.
        plan: `RoundingPlan.facts`.
        calibration_digests: digests of the documents to which the plan was fitted.
        modules: every Linear of the model.
        files: SHA-256 of the weight files and their index, by name.
    """

    quant_method: Literal["qvlm"] = "qvlm"
    format_version: int
    package_version: str
    backend: str
    model: str
    plan: Mapping[str, Any]
    calibration_digests: tuple[str, ...]
    modules: tuple[StoredModule, ...]
    files: Mapping[str, str] = Field(default_factory=dict)

    @property
    def quantized(self) -> tuple[StoredModule, ...]:
        """The modules that have a kernel."""
        return tuple(module for module in self.modules if module.kernel is not None)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "CheckpointRecord":
        """Validate a ``quantization_config``.

        Raises:
            QVLMError: a newer version wrote it, or it is incomplete or altered.
        """
        version = content.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise QVLMError(
                f"the quantized checkpoint has format {version}, written by version {content.get('package_version')} "
                f"of qvlm_plugin; this version reads up to {FORMAT_VERSION}"
            )
        try:
            record = cls.model_validate(dict(content))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise QVLMError(f"config.json: quantization_config is damaged: {where}: {first['msg']}") from error
        if table_hash([module.plan for module in record.modules]) != record.plan.get("table_hash"):
            raise QVLMError("config.json: quantization_config is altered: the hash of its module table differs")
        return record


def verify_files(record: CheckpointRecord, folder: Path) -> None:
    """Compare the weight files in ``folder`` with their hashes.

    Raises:
        QVLMError: a file is missing, truncated or altered; the message names it.
    """
    for name, expected in record.files.items():
        file = inside(folder, name, "config.json: quantization_config")
        if not file.is_file():
            raise QVLMError(f"{str(file)!r} is missing from the quantized checkpoint")
        if file_hash(file) != expected:
            raise QVLMError(f"{str(file)!r} is truncated or altered (its hash differs from that in config.json)")


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stored_form(neutral: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A kernel's neutral tensors as they are stored, with the tensor ``weight``; none shares memory with another."""
    device = next(iter(neutral.values())).device
    guard = neutral.get(_GUARD, torch.empty(0, device=device)).flatten()
    return {name: tensor.detach().clone().contiguous() for name, tensor in {**neutral, _GUARD: guard}.items()}


def specification(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, as ``uint8[64,128]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"


def lay_out(record: CheckpointRecord, model: nn.Module) -> None:
    """Replace Linears of ``model`` by modules with empty tensors on the meta device, for the stored tensors.

    Raises:
        QVLMError: a module is not a Linear of this shape in the model, its rotation is impossible, or its kernel is
            unknown.
    """
    kernels = _known_kernels()
    for module in record.quantized:
        plan = module.plan
        try:
            linear = model.get_submodule(plan.name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != plan.shape:
            raise QVLMError(
                f"the quantized checkpoint has {plan.name} as Linear {plan.shape}, which the model does not have"
            )
        if module.kernel not in kernels:
            raise QVLMError(
                f"the quantized checkpoint stores {plan.name} for kernel {module.kernel!r}, which no installed plugin "
                f"provides; known are {', '.join(kernels)}"
            )
        if module.rotation and (reason := module.rotation.obstacle(plan)):
            raise QVLMError(f"the quantized checkpoint rotates the inputs of {plan.name}, which cannot be: {reason}")
        if bool(module.rotation and module.rotation.scaled) != (ROTATION_SCALE in module.tensors):
            raise QVLMError(
                f"the quantized checkpoint's {plan.name} has {ROTATION_SCALE} without a scaled rotation, or vice versa"
            )
        tensors = {name: _empty(text) for name, text in module.tensors.items()}
        try:
            layer = QuantLinear(tensors, plan.weight, plan.activation, kernels[module.kernel], plan.shape)
        except KeyError as error:
            raise QVLMError(
                f"the quantized checkpoint stores {plan.name} with an invalid tensor name: {error}"
            ) from error
        model.set_submodule(plan.name, layer)


def types_of_others(record: CheckpointRecord, model: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes of the parameters outside quantized modules, by name."""
    packed = tuple(f"{module.plan.name}." for module in record.quantized)
    return {name: tensor.dtype for name, tensor in model.named_parameters() if not name.startswith(packed)}


def pack(record: CheckpointRecord, model: nn.Module, compute_type: torch.dtype) -> Execution:
    """Repack the stored tensors of each module, one after another, into the run-time layout of its device.

    If a kernel cannot run, the reference kernel replaces it, with the same weight dequantized.

    Args:
        record, model: the checkpoint, and the model into which its tensors were loaded.
        compute_type: dtype of the model's other weights.

    Raises:
        QVLMError: a module is offloaded, or no kernel can run it on its device.
    """
    kernels, choices = _known_kernels(), {}
    for module in record.quantized:
        layer = model.get_submodule(module.plan.name)
        choice = _choose(module, kernels, next(layer.parameters()).device)
        neutral = {name: getattr(layer, name).detach() for name in layer.tensor_names}
        guard, scale = neutral.pop(_GUARD), neutral.pop(ROTATION_SCALE, None)
        if guard.numel():
            neutral[_GUARD] = guard.view(module.plan.shape)
        with parsed_elsewhere(f"the stored tensors of {module.plan.name} are not those of kernel {module.kernel}"):
            if choice.kernel.name != module.kernel:
                neutral = layer.kernel.restore(neutral, layer.activation_format)
                layer.kernel = choice.kernel
            layer.set_tensors(choice.kernel.pack(neutral, layer.activation_format, guard.device))
        if module.rotation is not None:
            scales = {f"{module.rotation.site}/scale": scale}
            layer.rotate_inputs(factors_of(module.rotation, scales, guard.device)[0])
        layer.to(compute_type)
        trim_heap()
        choices[module.plan.name] = choice
    share_within_sites([module.plan for module in record.quantized], model)
    return Execution(choices)


def _choose(module: StoredModule, kernels: Mapping[str, Kernel], device: torch.device) -> Choice:
    plan = module.plan
    if device.type == "meta":
        raise QVLMError(f"{plan.name} is offloaded; choose a device_map that keeps the weights on devices")
    kernel = kernels[module.kernel]
    reason = kernel.obstacle(plan.weight, plan.activation, plan.shape, device)
    if reason is None:
        return Choice(kernel, tuple(module.refused.items()), bool(module.refused))
    if kernel.restore is None:
        raise QVLMError(f"{plan.name} is stored for kernel {kernel.name}, which cannot run on {device}: {reason}")
    return Choice(kernels["reference"], ((kernel.name, reason),), True)


def _known_kernels() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in backends.kernels("auto")}


def _empty(text: str) -> Tensor:
    match = re.fullmatch(r"([a-z0-9_]+)\[((?:[0-9]{1,12},?){0,4})\]", text)
    dtype = getattr(torch, match[1], None) if match else None
    sizes = [int(size) for size in match[2].split(",") if size] if match else []
    if not isinstance(dtype, torch.dtype) or prod(sizes) >= _MOST_ELEMENTS:
        raise QVLMError(f"config.json: {text!r} is not a tensor's type and shape, such as uint8[64,128]")
    return torch.empty(sizes, dtype=dtype, device="meta")
