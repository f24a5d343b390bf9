"""Rounding plans: the decisions of a quantization method, as plain data.

A plan lists every Linear of a model with the formats of its weight and of its input, and holds the tensors that those
formats need (bounds, clipping ratios). It can be saved, compared, shared and applied again, by one function for all
methods. It does not contain the weights: their codes follow from the model and the formats, or are among the tensors
(`WeightFormat.stored`).

On disk a plan is a folder with ``plan.json`` (readable) and ``plan.safetensors``. With codes it is as large as the
packed model; its tensors are therefore mapped into memory, and written and hashed piece by piece.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qvlm_plugin import __version__
from qvlm_plugin.atomic import require_writable, staged
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import LARGEST_PRODUCT
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.selection import Choice, Execution, choose
from qvlm_plugin.linear import QuantLinear, share_parameters
from qvlm_plugin.packing import codes_per_byte, packed_width
from qvlm_plugin.plan_header import (
    HEADER,
    TENSORS,
    CalibrationRecord,
    Fold,
    ModulePlan,
    PlanFacts,
    PlanHeader,
    Rotation,
    read_header,
)
from qvlm_plugin.rotation import factors, rotate, scaled
from qvlm_plugin.topology import linear_layers


@dataclass(frozen=True, eq=False)
class RoundingPlan(PlanFacts):
    """The result of fitting a method to a model.

    Attributes:
        method, scheme, options: the request.
        model: fingerprint of the checkpoint that the plan belongs to (`LoadedModel.fingerprint`).
        modules: every Linear of the model.
        tensors: ``<site>/<parameter>`` of activation formats, ``<linear>/<parameter>`` of weight formats,
            ``<site>/scale`` of folds and scaled rotations, ``<name>/value`` of replaced parameters; all on the CPU.
        folds: scales to move between modules before quantizing, in this order.
        replaced: names of the model's own parameters that take new values (trained norms), before any fold.
        rotations: rotations of sites' inputs, at most one for each site.
        calibration: the documents used; None for data-free methods.
        search_seconds: wall time of the search.
        record: the course of the search, as JSON data for people and reports (a loss curve, a partition).
    """

    method: str
    scheme: str
    options: Mapping[str, Any]
    model: str
    modules: tuple[ModulePlan, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()
    replaced: tuple[str, ...] = ()
    rotations: tuple[Rotation, ...] = ()
    calibration: CalibrationRecord | None = None
    search_seconds: float = 0.0
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {name: tensor.detach().cpu() for name, tensor in self.tensors.items()})

    @cached_property
    def tensors_sha256(self) -> str:
        """SHA-256 of the tensors' file: the one that `save` writes, or from which they were loaded."""
        sha = hashlib.sha256()
        for part in _file_parts(self.tensors):
            sha.update(part)
        return sha.hexdigest()

    def save(self, directory: Path) -> Path:
        """Write the plan's folder in one step, completely or not at all. An older plan there is replaced."""
        directory = Path(directory)
        header = PlanHeader(
            format_version=self.oldest_format,
            package_version=__version__,
            method=self.method,
            scheme=self.scheme,
            options=dict(self.options),
            model=self.model,
            calibration=self.calibration,
            search_seconds=self.search_seconds,
            tensors_sha256=self.tensors_sha256,
            modules=self.modules,
            folds=self.folds,
            replaced=self.replaced,
            rotations=self.rotations,
            record=dict(self.record),
        )
        require_plan_folder(directory)
        with staged(directory, replaces=True) as folder:
            with (folder / TENSORS).open("wb") as stream:
                stream.writelines(_file_parts(self.tensors))
            (folder / HEADER).write_text(header.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return directory

    @classmethod
    def load(cls, directory: Path | str) -> "RoundingPlan":
        """Read a plan's folder.

        Raises:
            QVLMError: a file is missing, incomplete, altered, or written by a newer version.
        """
        header = read_header(directory)
        try:
            tensors = load_file(Path(directory) / TENSORS)
        except SafetensorError as error:
            raise QVLMError(f"plan={str(directory)!r}: {TENSORS} does not load: {error}") from error
        values = {name: getattr(header, name) for name in cls.__dataclass_fields__ if name != "tensors"}
        plan = cls(**values, tensors=tensors)
        object.__setattr__(plan, "tensors_sha256", header.tensors_sha256)
        return plan


def require_plan_folder(directory: Path) -> None:
    """Check, before a search, that its plan can be saved in a folder.

    Raises:
        QVLMError: the folder contains something other than a plan, or cannot be written.
    """
    names = {file.name for file in directory.iterdir()} if directory.is_dir() else set()
    if names - {HEADER, TENSORS} or directory.is_file():
        raise QVLMError(f"{str(directory)!r} holds files other than a plan; choose another folder")
    require_writable(directory)


def check_plan(
    plan: RoundingPlan,
    model: nn.Module,
    fingerprint: str,
    kernels: tuple[Kernel, ...],
    strict: bool = False,
    device: torch.device | None = None,
) -> Execution:
    """Check that a plan fits a model, and choose kernels.

    Args:
        plan: a plan for this model.
        model: the model in full precision, as loaded.
        fingerprint: fingerprint of the loaded checkpoint.
        kernels: candidates in order of preference; the first that supports a module runs it, and the last is the
            fallback.
        strict: whether falling back is an error.
        device: the device of weights that are not loaded yet; None for a model whose weights are loaded.

    Returns:
        Which kernel runs which module.

    Raises:
        QVLMError: the plan belongs to another model, lists a module that is missing or of another shape, leaves one
            out, lacks a tensor, has an impossible rotation; no kernel supports a module; or one falls back under
            ``strict``.
    """
    if plan.model != fingerprint:
        raise QVLMError(
            f"plan was made for another model: its fingerprint is {plan.model[:12]}…, that of the loaded model "
            f"{fingerprint[:12]}…; the model's files, image_aspect_ratio or router_noise_seed differ, or an earlier "
            "version of qvlm_plugin, whose fingerprints covered fewer files, made the plan"
        )
    linears = linear_layers(model)
    _require_same_linears(plan, linears)
    if device is None and (offloaded := [name for name, linear in linears.items() if linear.weight.is_meta]):
        raise QVLMError(f"{offloaded[0]} is offloaded; choose a device_map that keeps the weights on devices")
    _require_tensors(plan, model)
    _require_rotations(plan)
    execution = Execution(
        {
            module.name: _choose(kernels, module, device or linears[module.name].weight.device)
            for module in plan.quantized
        }
    )
    if strict:
        execution.require_no_fallback()
    return execution


@torch.no_grad()
def replace_and_fold(plan: RoundingPlan, modules: Mapping[str, nn.Module]) -> None:
    """Set replaced parameters to their new values and apply folds, in place, in the given modules only.

    Args:
        plan: a checked plan.
        modules: modules by full name.
    """
    for name in plan.replaced:
        owner, _, parameter = name.rpartition(".")
        if owner in modules:
            getattr(modules[owner], parameter).copy_(plan.tensors[f"{name}/value"])
    readers = {module.name: module.site for module in plan.modules if module.name in modules}
    for fold in plan.folds:
        scale = plan.tensors[f"{fold.site}/scale"]
        if fold.producer in modules:
            divide_channels(modules[fold.producer], scale)
        for name, site in readers.items():
            if site == fold.site:
                multiply_columns(modules[name], fold, scale)


def begin_applying(
    plan: RoundingPlan, model: nn.Module, fingerprint: str, kernels: tuple[Kernel, ...], strict: bool = False
) -> Execution:
    """Run `check_plan`, then `replace_and_fold`: the steps before Linears are rounded."""
    execution = check_plan(plan, model, fingerprint, kernels, strict)
    replace_and_fold(plan, dict(model.named_modules()))
    return execution


def apply_plan(
    plan: RoundingPlan, model: nn.Module, fingerprint: str, kernels: tuple[Kernel, ...], strict: bool = False
) -> Execution:
    """Quantize the Linears of ``model`` by the plan, in place; arguments and errors as in `check_plan`."""
    execution = begin_applying(plan, model, fingerprint, kernels, strict)
    for module in plan.quantized:
        linear = model.get_submodule(module.name)
        kernel = execution.choices[module.name].kernel
        layer = quantized_linear(module, linear, plan.tensors, kernel, plan.rotation_of(module))
        put_layer(model, module.name, layer)
    share_within_sites(plan.quantized, model)
    return execution


def share_within_sites(modules: Sequence[ModulePlan], model: nn.Module) -> None:
    """`share_parameters` among the Linears of each site; all ``modules`` must be quantized."""
    sites: dict[str | None, list[QuantLinear]] = {}
    for module in modules:
        sites.setdefault(module.site, []).append(model.get_submodule(module.name))
    for layers in sites.values():
        share_parameters(layers)


def put_layer(model: nn.Module, name: str, layer: QuantLinear) -> None:
    """Replace the Linear named ``name`` by ``layer``."""
    linear = model.get_submodule(name)
    if hasattr(linear, "_hf_hook"):  # accelerate's hook moves inputs to the layer's device in a dispatched model
        add_hook_to_module(layer, linear._hf_hook)
    model.set_submodule(name, layer)


def quantized_linear(
    module: ModulePlan,
    linear: nn.Linear,
    tensors: Mapping[str, Tensor],
    kernel: Kernel,
    rotation: Rotation | None = None,
) -> QuantLinear:
    """``linear`` quantized by its entry ``module`` in a plan, with the plan's ``tensors`` and the site's rotation."""
    parameters = parameters_of(module, tensors, linear.weight.device)
    if rotation is None:
        return QuantLinear.from_linear(linear, module.weight, module.activation, parameters, kernel)
    of_inputs, of_weights = factors_of(rotation, tensors, linear.weight.device)
    rotated = rotated_linear(linear, of_weights)
    layer = QuantLinear.from_linear(rotated, module.weight, module.activation, parameters, kernel)
    layer.rotate_inputs(of_inputs)
    return layer


def factors_of(
    rotation: Rotation, tensors: Mapping[str, Tensor], device: torch.device | str
) -> tuple[list[Tensor], list[Tensor]]:
    """The factors by which inputs and weights are multiplied, as `rotation.factors`; ``tensors`` are the plan's."""
    matrices = factors(rotation, device)
    if not rotation.scaled:
        return matrices, matrices
    scale = tensors[f"{rotation.site}/scale"].to(device, torch.float32)
    return scaled(matrices, 1 / scale), scaled(matrices, scale)


def rotated_linear(linear: nn.Linear, factors: Sequence[Tensor]) -> nn.Linear:
    """A Linear whose output for rotated inputs equals that of ``linear`` for the inputs themselves."""
    rotated = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    rotated.weight = nn.Parameter(rotate(linear.weight.detach(), factors), requires_grad=False)
    rotated.bias = linear.bias
    return rotated


def parameters_of(module: ModulePlan, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors that a module's formats name, by parameter name, from a plan's ``tensors``."""
    return {name: tensors[key].to(device) for name, key in _tensor_keys(module).items()}


@torch.no_grad()
def apply_fold(fold: Fold, scale: Tensor, producer: nn.Module, readers: Sequence[nn.Linear]) -> None:
    """Divide the producer's channels by ``scale`` [channels produced] and multiply the readers' columns, in place."""
    divide_channels(producer, scale)
    for reader in readers:
        multiply_columns(reader, fold, scale)


@torch.no_grad()
def divide_channels(producer: nn.Module, scale: Tensor) -> None:
    """Divide the output channels of a norm or Linear by ``scale`` [channels], in place."""
    scale = scale.to(producer.weight.device, torch.float32)
    # A norm scales its output channel by channel; a Linear's output channels are the rows of its weight.
    rows = scale if producer.weight.dim() == 1 else scale.unsqueeze(1)
    producer.weight.copy_(producer.weight.float() / rows)
    if getattr(producer, "bias", None) is not None:
        producer.bias.copy_(producer.bias.float() / scale)


@torch.no_grad()
def multiply_columns(reader: nn.Linear, fold: Fold, scale: Tensor) -> None:
    """Multiply the columns of a Linear that reads scaled channels, in place."""
    columns = fold.spread(scale.to(reader.weight.device, torch.float32), reader.in_features)
    reader.weight.copy_(reader.weight.float() * columns)


def _tensor_keys(module: ModulePlan) -> dict[str, str]:
    """The key among the plan's tensors of each parameter that a module's formats name."""
    shared = (*module.activation.parameters, *module.weight.site_parameters)
    own = {name: f"{module.name}/{name}" for name in module.weight.parameters}
    return {name: f"{module.site}/{name}" for name in shared} | own


def _require_same_linears(plan: RoundingPlan, linears: Mapping[str, nn.Linear]) -> None:
    planned = {module.name: module for module in plan.modules}
    if missing := sorted(planned.keys() - linears.keys()):
        raise QVLMError(f"plan lists {len(missing)} modules that the model does not have, for example {missing[0]}")
    if unlisted := sorted(linears.keys() - planned.keys()):
        raise QVLMError(f"plan leaves out {len(unlisted)} Linear layers of the model, for example {unlisted[0]}")
    for name, linear in linears.items():
        if tuple(linear.weight.shape) != planned[name].shape:
            raise QVLMError(f"plan has {name} as {planned[name].shape}, the model as {tuple(linear.weight.shape)}")


def _choose(kernels: tuple[Kernel, ...], module: ModulePlan, device: torch.device) -> Choice:
    choice = choose(kernels, module.weight, module.activation, module.shape, device)
    if choice is None:
        raise QVLMError(
            f"no kernel of {', '.join(kernel.name for kernel in kernels) or 'none'} supports {module.name} "
            f"({module.weight}, {module.activation}) on {device}"
        )
    return choice


def _require_tensors(plan: RoundingPlan, model: nn.Module) -> None:
    """Check that the plan has every tensor that applying it reads, finite and of the right size."""
    sizes = {}
    for module in plan.modules:
        if module.weight.stored:
            _require_codes(module, plan.tensors)
        for name, key in _tensor_keys(module).items():
            if module.weight.stored and name in module.weight.parameters:
                continue
            sizes[key] = {"clip_ratio": 1, "clip": module.weight.groups(module.shape)}.get(name, module.shape[1])
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name in plan.replaced:
        if name not in parameters:
            raise QVLMError(f"plan replaces {name}, which is not a parameter of the model")
        sizes[f"{name}/value"] = parameters[name].numel()
    for fold in plan.folds:
        if fold.producer not in modules or not plan.readers(fold.site):
            raise QVLMError(f"plan folds scales from {fold.producer} into {fold.site}, which the model does not have")
        sizes[f"{fold.site}/scale"] = len(modules[fold.producer].weight)
    sizes |= {f"{rotation.site}/scale": rotation.channels for rotation in plan.rotations if rotation.scaled}
    for key, size in sizes.items():
        tensor = plan.tensors.get(key)
        if tensor is None or tensor.numel() != size or not tensor.isfinite().all():
            raise QVLMError(f"plan has no finite tensor {key} of {size} elements")
        if key.endswith("/scale") and not (tensor > 0).all():
            raise QVLMError(f"plan has a scale in {key} that is not positive")


def _require_rotations(plan: RoundingPlan) -> None:
    """Check that each rotation belongs to a site whose inputs can be rotated, and no site has two."""
    readers: dict[str | None, list[ModulePlan]] = {}
    for module in plan.modules:
        readers.setdefault(module.site, []).append(module)
    folded = {fold.site for fold in plan.folds}
    for rotation in plan.rotations:
        modules = readers.pop(rotation.site, None)
        if modules is None:
            obstacle = "no Linear of the model has this site, or the plan rotates it already"
        elif rotation.scaled and rotation.site in folded:
            obstacle = "its scale is folded into another module already"
        else:
            obstacle = next(filter(None, map(rotation.obstacle, modules)), None)
        if obstacle:
            raise QVLMError(f"plan rotates the inputs of {rotation.site}, which cannot be: {obstacle}")


def _require_codes(module: ModulePlan, tensors: Mapping[str, Tensor]) -> None:
    """Check that the plan has valid stored codes of a Linear: types, shapes and ranges."""
    fmt, (rows, columns) = module.weight, module.shape
    groups, largest = fmt.groups(module.shape) // rows, 2**fmt.bits - 1
    shapes = {
        "codes": (rows, packed_width(columns, fmt.bits)),
        "scales": (rows, groups),
        "units": (rows, 1),
        "multiples": (rows, groups),
        "zero_points": (rows, groups),
        "absmax": (fmt.groups(module.shape),),
    }
    for name in fmt.parameters:
        key, floating = f"{module.name}/{name}", name in ("scales", "units", "absmax")
        tensor = tensors.get(key)
        right_type = tensor is not None and (tensor.is_floating_point() if floating else tensor.dtype == torch.uint8)
        if not right_type or tensor.shape != shapes[name]:
            raise QVLMError(f"plan has no {'floating' if floating else 'uint8'} tensor {key} {list(shapes[name])}")
        # A block of zeros has a scale of 0 in the normal-float type; the scale of integers is 1 there.
        if floating and not (tensor.isfinite() & ((tensor > 0) | (name == "absmax") & (tensor == 0))).all():
            raise QVLMError(f"plan has scales in {key} that are not positive and finite")
        # If several codes share a byte, every value of the byte is valid.
        of_codes = name == "zero_points" or (name == "codes" and codes_per_byte(fmt.bits) == 1)
        if of_codes and int(tensor.max()) > largest:
            raise QVLMError(f"plan has a code in {key} that is larger than {largest}, the largest of {fmt.bits} bits")
    if "multiples" in fmt.parameters:
        _require_multiples(module, tensors)


def _require_multiples(module: ModulePlan, tensors: Mapping[str, Tensor]) -> None:
    """Check that products of a Linear's progressive multiples and codes fit 8 bits."""
    levels, key = 2**module.weight.bits - 1, f"{module.name}/multiples"
    multiples = tensors[key].int()
    zero_points = tensors.get(f"{module.name}/zero_points", torch.tensor(2 ** (module.weight.bits - 1)))
    farthest = torch.maximum(zero_points, levels - zero_points)
    if not ((multiples > 0) & (multiples * farthest <= LARGEST_PRODUCT)).all():
        raise QVLMError(f"plan has a multiple in {key} that is 0, or whose product with a code does not fit 8 bits")


def _file_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of the safetensors file of ``tensors``, byte for byte as the library writes it, without a copy."""
    layout = json.loads(save({name: tensor.new_empty(0) for name, tensor in tensors.items()})[8:])  # in its own order
    end = 0
    for name, entry in layout.items():
        start, end = end, end + tensors[name].nbytes
        entry |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    header = json.dumps(layout, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little")
    yield header
    for name in layout:
        yield tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data
