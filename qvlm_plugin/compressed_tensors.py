"""Export in the ``compressed-tensors`` format, for the schemes that vLLM serves.

Three kinds of modules can be expressed:

* W4A16 and W8A16 (``pack-quantized``): the plan's codes, scales and zero points unchanged, by group or by channel.
* W4A8 (``pack-quantized``): the same, for symmetric weights.
* W8A8 (``int-quantized``): the plan's rounded weight, rounded once more to 8 bits with one symmetric scale for each
  output channel, as kernel ``int8`` does.

Activations of 8 bits are rounded per token, symmetrically, by their largest magnitude; the plan's ranges (static bounds
of channels, clipping ratios of tokens, centers) cannot be expressed and are left out. Rotations can be expressed in
part, see `compressed_rotations`.

transformers does not load packed zero points into packed modules (with compressed-tensors 0.20 these have unpacked
ones), unless it dequantizes every weight while loading. Folders with asymmetric weights request this; plans that
combine such weights with modules in another format are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from qvlm_plugin.atomic import require_vacant
from qvlm_plugin.compressed_rotations import Rotations
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.export import must_run, write_folder
from qvlm_plugin.kernels.base import corrected_bias
from qvlm_plugin.kernels.reference import REFERENCE, quantized_values
from qvlm_plugin.model_card import COMPRESSED, model_card
from qvlm_plugin.models.dry_run import answer
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan, begin_applying, factors_of, parameters_of, rotated_linear
from qvlm_plugin.plan_header import ModulePlan
from qvlm_plugin.plan_request import PlanRequest
from qvlm_plugin.quantizers import int_weight
from qvlm_plugin.rotation import rotate_back
from qvlm_plugin.scheme import PARTS

PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"

SERVED = ((4, 16), (8, 16), (4, 8), (8, 8))
"""Bits of weights and activations that can be expressed."""

_ALLOWED = ", ".join(f"w{bits}a{rounded}" for bits, rounded in SERVED)


@dataclass(frozen=True)
class Group:
    """A ``config_group``: what modules of one scheme have in common.

    Attributes:
        format: format in which the package stores them.
        bits, group_size, symmetric: properties of the weights.
        rounds_tokens: whether inputs are rounded to 8 bits.
    """

    format: str
    bits: int
    group_size: int | None
    symmetric: bool
    rounds_tokens: bool

    def scheme(self, targets: list[str]) -> QuantizationScheme:
        """The group as a scheme of the package."""
        weights = QuantizationArgs(
            num_bits=self.bits,
            type="int",
            symmetric=self.symmetric,
            strategy="channel" if self.group_size is None else "group",
            group_size=self.group_size,
            dynamic=False,
        )
        tokens = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
        return QuantizationScheme(
            targets=targets,
            weights=weights,
            input_activations=tokens if self.rounds_tokens else None,
            format=self.format,
        )

    def __str__(self) -> str:
        return f"{self.format} w{self.bits}a{8 if self.rounds_tokens else 16}"


def check_compressible(request: PlanRequest) -> None:
    """Check a request before its plan is searched.

    Raises:
        QVLMError: the format cannot express the scheme or the kind of weights.
    """
    failure = "--format compressed-tensors cannot express"
    if getattr(request.options, "weights", "int") != "int":
        raise QVLMError(f"{failure} weights={request.options.weights}; add --option weights=int")
    for part in PARTS:
        widths = getattr(request.scheme, part)
        if not widths.is_identity and (widths.weight, widths.activation) not in SERVED:
            raise QVLMError(f"{failure} {widths} of the {part} (scheme={request.scheme}); allowed are {_ALLOWED}")


def export_compressed_tensors(
    plan: RoundingPlan, loaded: LoadedModel, directory: Path, *, shard_size: int | str = "5GB"
) -> dict[Group, int]:
    """Quantize ``loaded`` by ``plan`` and write it; the model in memory cannot be used afterwards.

    Args:
        plan: a plan for this model.
        loaded: the model in full precision.
        directory: new or empty folder; it is written completely or not at all.
        shard_size: maximum size of a weight file, as transformers' ``max_shard_size``.

    Returns:
        How many modules each group has.

    Raises:
        QVLMError: the format cannot express a module, the folder is not empty, or the quantized model does not answer
            a prompt with finite numbers; or see `check_plan`.
    """
    require_vacant(directory)
    model = loaded.model
    groups: dict[Group, list[ModulePlan]] = {}
    for module in plan.quantized:
        groups.setdefault(_group(module), []).append(module)
    if not groups:
        raise QVLMError(f"the plan (scheme={plan.scheme}) quantizes nothing, so there is nothing to compress")
    if len(groups) > 1 and (odd := [members[0] for group, members in groups.items() if not group.symmetric]):
        raise QVLMError(
            f"--format compressed-tensors cannot express {odd[0].name}: its weights are asymmetric, and other modules "
            "have another format; search the plan with --option symmetric=true"
        )
    for module in plan.quantized:
        if module.weight.corrected and model.get_submodule(module.name).bias is None:
            raise QVLMError(
                f"--format compressed-tensors cannot express {module.name}: its bias is corrected, but the model "
                "has no bias there"
            )
    rotations = Rotations.of(plan, model)
    begin_applying(plan, model, loaded.fingerprint, (REFERENCE,))
    stored = {
        module.name: _compress(module, group, plan, model) for group, members in groups.items() for module in members
    }
    with must_run():
        answer(model, loaded.processor, f"pretrained={loaded.source!r}")
    for name, tensors in stored.items():
        frozen = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in tensors.items()}
        model.set_submodule(name, nn.ParameterDict(frozen))
    rotations.store(model)
    model.config.quantization_config = _configuration(plan, groups) | rotations.configuration()
    counts = {group: len(members) for group, members in groups.items()}
    arithmetic = ", ".join(f"{group} {count}" for group, count in counts.items())
    write_folder(loaded, directory, shard_size, model_card(directory.name, loaded.source, plan, arithmetic, COMPRESSED))
    return counts


def _group(module: ModulePlan) -> Group:
    weight, activation, columns = module.weight, module.activation, module.shape[1]
    rounds = activation.kind != "none"
    group = weight.group_size if weight.group_size and weight.group_size < columns else None
    if weight.kind != "int":
        reason = f"{weight} is not a weight of integers"
    elif (weight.bits, activation.bits) not in SERVED:
        reason = f"w{weight.bits}a{activation.bits} is none of {_ALLOWED}"
    elif rounds and weight.bits == 8:
        return Group(INTEGER, 8, None, True, True)
    elif rounds and not weight.symmetric:
        reason = "its weights are asymmetric and its inputs rounded; search the plan with --option symmetric=true"
    elif group is None or columns % group == 0:
        return Group(PACKED, weight.bits, group, weight.symmetric, rounds)
    else:
        reason = f"groups of {group} do not divide its {columns} input features"
    raise QVLMError(f"--format compressed-tensors cannot express {module.name}: {reason}")


def _compress(module: ModulePlan, group: Group, plan: RoundingPlan, model: nn.Module) -> dict[str, Tensor]:
    """The stored tensors of one Linear, which gets the weight and bias that they represent."""
    linear = model.get_submodule(module.name)
    rotation, dtype, device = plan.rotation_of(module), linear.weight.dtype, linear.weight.device
    factors = None if rotation is None else factors_of(rotation, plan.tensors, device)[1]
    weight = (linear if factors is None else rotated_linear(linear, factors)).weight.detach()
    parameters = parameters_of(module, plan.tensors, device)
    state = _rounded(weight, module, group, parameters)
    bias = corrected_bias(weight, state["weight"], linear.bias, parameters.get("mean"))
    values = state["weight"] if factors is None else rotate_back(state["weight"], factors)
    linear.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        state["bias"] = linear.bias.detach()
    compressor = BaseCompressor.get_value_from_registry(group.format)
    return {name: tensor.contiguous() for name, tensor in compressor.compress(state, group.scheme([])).items()}


def _rounded(weight: Tensor, module: ModulePlan, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the package compresses: the rounded ``weight`` in float32, and the scale and zero point of its codes."""
    if group.format == INTEGER:
        planned = quantized_values(weight, module.weight, parameters)
        scale = (planned.abs().amax(dim=1, keepdim=True) / 127).to(weight.dtype)
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (planned / scale.float()).round().clamp(-127, 127)
        return {"weight": codes * scale.float(), "weight_scale": scale}
    quantized = int_weight(weight, module.weight, parameters)
    quantized = replace(quantized, scale=quantized.scale.to(weight.dtype))  # progressive scales have 32 bits
    middle = 2 ** (group.bits - 1)  # the package's codes are signed
    zero_point = (quantized.zero_point.int() - middle).to(torch.int8)
    return {"weight": quantized.dequantize(), "weight_scale": quantized.scale, "weight_zero_point": zero_point}


def _configuration(plan: RoundingPlan, groups: Mapping[Group, list[ModulePlan]]) -> dict[str, Any]:
    formats = {group.format for group in groups}
    ignored = [module.name for module in plan.modules if module.is_identity]
    single = len(groups) == 1
    schemes = [
        group.scheme(["Linear"] if single else [module.name for module in members]) for group, members in groups.items()
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(formats)) if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        # Only the keys that are set: versions of the package refuse keys that they do not know.
        "config_groups": {
            f"group_{index}": scheme.model_dump(mode="json", exclude_unset=True) for index, scheme in enumerate(schemes)
        },
        "ignore": ignored,
        "dequantize": not all(group.symmetric for group in groups),
        "qvlm": {**plan.facts, "model": plan.model},
    }
