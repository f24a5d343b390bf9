"""Rounding plans: what a quantization method decided, as plain data.

A plan lists every Linear of a model with the formats of its weight and of its input, and holds the small tensors that
those formats need (bounds, clipping ratios). It can be saved, compared, shared and applied again; applying it is one
function for all methods. The weights themselves are not in it: their codes follow from the model and the formats.

On disk a plan is a folder with ``plan.json`` (readable) and ``plan.safetensors``.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.hooks import add_hook_to_module
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qvlm_plugin import __version__
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.scheme import PARTS
from qvlm_plugin.topology import linear_layers

FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModulePlan(_Record):
    """What becomes of one Linear.

    Attributes:
        name: full name in the model.
        part: ``vision``, ``projector`` or ``decoder``; ``unused`` for vision blocks that the output does not depend on,
            ``other`` for what lies outside (the language model's head).
        site: name of the activation quantizer it shares; None when the topology gives it none.
        shape: [out_features, in_features].
        weight, activation: the formats.
    """

    name: str
    part: str
    site: str | None
    shape: tuple[int, int]
    weight: WeightFormat
    activation: ActivationFormat

    @property
    def is_identity(self) -> bool:
        """Whether the Linear stays as it is."""
        return self.weight.kind == "none" and self.activation.kind == "none"


class CalibrationRecord(_Record):
    """Which documents a plan was fitted on."""

    source: str
    seed: int
    digests: tuple[str, ...]


class _Header(_Record):
    """The content of ``plan.json``."""

    format: Literal["qvlm-rounding-plan"] = "qvlm-rounding-plan"
    format_version: int
    package_version: str
    method: str
    scheme: str
    options: dict[str, Any]
    model: str
    calibration: CalibrationRecord | None
    search_seconds: float
    tensors_sha256: str
    modules: tuple[ModulePlan, ...]


@dataclass(frozen=True, eq=False)
class RoundingPlan:
    """The outcome of fitting a method to a model.

    Attributes:
        method, scheme, options: what was asked for.
        model: fingerprint of the checkpoint the plan belongs to (`LoadedModel.fingerprint`).
        modules: every Linear of the model.
        tensors: the formats' parameters, named ``<site>/<parameter>``; see `ActivationFormat`.
        calibration: the documents used, None for data-free methods.
        search_seconds: wall time of the fit.
    """

    method: str
    scheme: str
    options: Mapping[str, Any]
    model: str
    modules: tuple[ModulePlan, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    calibration: CalibrationRecord | None = None
    search_seconds: float = 0.0

    @property
    def hash(self) -> str:
        """SHA-256 of what the plan does: model, modules and tensors; not of how long it took or where it lies."""
        return hashlib.sha256(f"{self.model}{self.table_hash}{_digest(_serialize(self.tensors))}".encode()).hexdigest()

    @property
    def table_hash(self) -> str:
        """SHA-256 of the per-module table alone."""
        return _digest(json.dumps([module.model_dump() for module in self.modules], sort_keys=True).encode())

    def effective_bits(self) -> dict[str, dict[str, float]]:
        """Mean bits of each part's weights (scales and zero points included) and input elements, by weight count."""
        table = {}
        for part in (*PARTS, "unused", "other"):
            modules = [module for module in self.modules if module.part == part]
            elements = sum(module.shape[0] * module.shape[1] for module in modules)
            if elements:
                table[part] = {
                    "weight": sum(m.weight.effective_bits(m.shape) * m.shape[0] * m.shape[1] for m in modules)
                    / elements,
                    "activation": sum(m.activation.bits * m.shape[0] * m.shape[1] for m in modules) / elements,
                }
        return table

    def save(self, directory: Path) -> Path:
        """Write the plan's folder in one step: it is there completely or not at all. An older plan is replaced."""
        directory = Path(directory)
        blob = _serialize(self.tensors)
        header = _Header(
            format_version=FORMAT_VERSION,
            package_version=__version__,
            method=self.method,
            scheme=self.scheme,
            options=dict(self.options),
            model=self.model,
            calibration=self.calibration,
            search_seconds=self.search_seconds,
            tensors_sha256=_digest(blob),
            modules=self.modules,
        )
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        (staging / "plan.safetensors").write_bytes(blob)
        (staging / "plan.json").write_text(header.model_dump_json(indent=1) + "\n", encoding="utf-8")
        staging.chmod(0o755)
        if directory.exists():
            if any(file.name not in ("plan.json", "plan.safetensors") for file in directory.iterdir()):
                shutil.rmtree(staging)
                raise QVLMError(f"{str(directory)!r} holds other files than a plan; choose another folder")
            shutil.rmtree(directory)
        os.replace(staging, directory)
        return directory

    @classmethod
    def load(cls, directory: Path | str) -> "RoundingPlan":
        """Read a plan's folder.

        Raises:
            QVLMError: it is missing, incomplete, altered, or written by a newer version.
        """
        directory = Path(directory)
        header_file, tensor_file = directory / "plan.json", directory / "plan.safetensors"
        for file in (header_file, tensor_file):
            if not file.is_file():
                raise QVLMError(f"plan={str(directory)!r}: {file.name} is missing; a plan folder has it")
        try:
            raw = json.loads(header_file.read_text(encoding="utf-8"))
            version = raw.get("format_version") if isinstance(raw, dict) else None
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise QVLMError(
                    f"plan={str(directory)!r} has format {version}, written by version {raw.get('package_version')}; "
                    f"this version reads up to {FORMAT_VERSION}"
                )
            header = _Header.model_validate(raw)
        except (UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
            raise QVLMError(
                f"plan={str(directory)!r}: plan.json is not a plan: {str(error).splitlines()[0]}"
            ) from error
        with tensor_file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != header.tensors_sha256:
                raise QVLMError(f"plan={str(directory)!r}: plan.safetensors is truncated or altered (its hash differs)")
        try:
            tensors = load_file(tensor_file)
        except SafetensorError as error:
            raise QVLMError(f"plan={str(directory)!r}: plan.safetensors does not load: {error}") from error
        values = {name: getattr(header, name) for name in cls.__dataclass_fields__ if name != "tensors"}
        return cls(**values, tensors=tensors)


def apply_plan(plan: RoundingPlan, model: nn.Module, fingerprint: str, kernels: tuple[Kernel, ...]) -> None:
    """Replace the Linears of ``model`` by what the plan says, in place.

    Args:
        plan: made for this model.
        model: in full precision, as loaded.
        fingerprint: of the loaded checkpoint.
        kernels: candidates in order of preference; the first that supports a module serves it.

    Raises:
        QVLMError: the plan belongs to another model, lists a module that is missing or of another shape, leaves one
            out, lacks a tensor, or no kernel supports a module. The model is unchanged then.
    """
    if plan.model != fingerprint:
        raise QVLMError(
            f"plan was made for another model: its fingerprint is {plan.model[:12]}…, "
            f"that of the loaded model {fingerprint[:12]}…"
        )
    linears = linear_layers(model)
    _require_same_linears(plan, linears)
    chosen = {}
    for module in plan.modules:
        if not module.is_identity:
            device = linears[module.name].weight.device
            chosen[module.name] = _choose(kernels, module, device)
            _require_tensors(plan, module)
    for module in plan.modules:
        if module.is_identity:
            continue
        linear = linears.pop(module.name)
        parameters = {
            name: plan.tensors[f"{module.site}/{name}"].to(linear.weight.device)
            for name in module.activation.parameters
        }
        quantized = QuantLinear.from_linear(linear, module.weight, module.activation, parameters, chosen[module.name])
        if hasattr(linear, "_hf_hook"):  # accelerate's: it brings inputs to the device of a dispatched model's layer
            add_hook_to_module(quantized, linear._hf_hook)
        model.set_submodule(module.name, quantized)


def _require_same_linears(plan: RoundingPlan, linears: Mapping[str, nn.Linear]) -> None:
    planned = {module.name: module for module in plan.modules}
    if missing := sorted(planned.keys() - linears.keys()):
        raise QVLMError(f"plan lists {len(missing)} modules that the model does not have, for example {missing[0]}")
    if unlisted := sorted(linears.keys() - planned.keys()):
        raise QVLMError(f"plan leaves out {len(unlisted)} Linear layers of the model, for example {unlisted[0]}")
    for name, linear in linears.items():
        if tuple(linear.weight.shape) != planned[name].shape:
            raise QVLMError(f"plan has {name} as {planned[name].shape}, the model as {tuple(linear.weight.shape)}")
        if linear.weight.is_meta:
            raise QVLMError(f"{name} is offloaded; choose a device_map that keeps the weights on devices")


def _choose(kernels: tuple[Kernel, ...], module: ModulePlan, device: torch.device) -> Kernel:
    for kernel in kernels:
        if kernel.supports(module.weight, module.activation, device):
            return kernel
    raise QVLMError(
        f"no kernel of {', '.join(kernel.name for kernel in kernels) or 'none'} supports {module.name} "
        f"({module.weight}, {module.activation}) on {device}"
    )


def _require_tensors(plan: RoundingPlan, module: ModulePlan) -> None:
    for name in module.activation.parameters:
        tensor = plan.tensors.get(f"{module.site}/{name}")
        size = module.shape[1] if module.activation.kind == "static_channel" else 1
        if tensor is None or tensor.numel() != size or not tensor.isfinite().all():
            raise QVLMError(
                f"plan has no finite tensor {module.site}/{name} of {size} elements, which {module.name} needs"
            )


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
