"""Export in the ``compressed-tensors`` format, for the schemes that vLLM serves.

Two kinds of modules can be expressed:

* W4A16 and W8A16 (``pack-quantized``): the plan's codes, scales and zero points as they are, by group or by channel.
* W8A8 (``int-quantized``): the plan's rounded weight, rounded once more to 8 bits with one symmetric scale for each
  output channel, as kernel ``int8`` does. Activations are rounded per token, symmetrically, by their largest magnitude;
  the plan's ranges (static bounds of channels, clipping ratios of tokens) have no place in the format and are left out.

transformers does not load packed zero points into packed modules (with compressed-tensors 0.20 these have unpacked
ones), but does where it dequantizes every weight while it loads. Folders of asymmetric weights ask for that; plans in
which these stand beside modules in another format are refused.

The layouts are those of the compressed-tensors package (``compressors/pack_quantized`` and ``naive_quantized``), which
reading them takes; writing does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm_plugin.atomic import require_vacant
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.export import must_run, write_folder
from qvlm_plugin.kernels.base import corrected_bias
from qvlm_plugin.kernels.reference import REFERENCE, quantized_values
from qvlm_plugin.model_card import COMPRESSED, model_card
from qvlm_plugin.models.dry_run import answer
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan, begin_applying, parameters_of
from qvlm_plugin.plan_header import ModulePlan
from qvlm_plugin.quantizers import int_weight

PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"

_WORD = 32


@dataclass(frozen=True)
class _Group:
    """A ``config_group``: what modules of one scheme have in common."""

    format: str
    bits: int
    group_size: int | None
    symmetric: bool

    def entry(self, targets: list[str]) -> dict[str, Any]:
        """Its JSON object."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        activations = tokens if self.format == INTEGER else None
        return {"targets": targets, "weights": weights, "input_activations": activations, "format": self.format}


def export_compressed_tensors(
    plan: RoundingPlan, loaded: LoadedModel, directory: Path, *, shard_size: str = "5GB"
) -> dict[str, int]:
    """Quantize ``loaded`` by ``plan`` and write it; the model in memory is used up.

    Args:
        plan: made for this model.
        loaded: in full precision.
        directory: to write; it must not exist, or be empty. It is there completely or not at all.
        shard_size: of weight files at most, as transformers' ``max_shard_size``.

    Returns:
        How many modules have each format.

    Raises:
        QVLMError: the format cannot express a module, the folder is not empty, or the quantized model does not answer
            a prompt with finite numbers; or see `check_plan`.
    """
    require_vacant(directory)
    model = loaded.model
    if plan.rotations:
        raise QVLMError(
            f"--format compressed-tensors cannot express the plan: it rotates the inputs of {plan.rotations[0].site} "
            "while the model runs"
        )
    groups: dict[_Group, list[ModulePlan]] = {}
    for module in plan.quantized:
        groups.setdefault(_group(module), []).append(module)
    if not groups:
        raise QVLMError(f"the plan (scheme={plan.scheme}) quantizes nothing, so there is nothing to compress")
    if len(groups) > 1 and (odd := [members[0] for group, members in groups.items() if not group.symmetric]):
        raise QVLMError(
            f"--format compressed-tensors cannot express {odd[0].name}: its weights are asymmetric and other modules "
            "in another format; search the plan with --option symmetric=true"
        )
    for module in plan.quantized:
        if module.weight.corrected and model.get_submodule(module.name).bias is None:
            raise QVLMError(
                f"--format compressed-tensors cannot express {module.name}: its bias is corrected, but the model has "
                "none there"
            )
    begin_applying(plan, model, loaded.fingerprint, (REFERENCE,))
    stored = {
        module.name: _compress(module, group, plan.tensors, model)
        for group, members in groups.items()
        for module in members
    }
    with must_run():
        answer(model, loaded.processor, f"pretrained={loaded.source!r}")
    for name, tensors in stored.items():
        frozen = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in tensors.items()}
        model.set_submodule(name, nn.ParameterDict(frozen))
    model.config.quantization_config = _configuration(plan, groups)
    counts = {group.format: sum(len(groups[g]) for g in groups if g.format == group.format) for group in groups}
    arithmetic = ", ".join(f"{name} {count}" for name, count in counts.items())
    write_folder(loaded, directory, shard_size, model_card(directory.name, loaded.source, plan, arithmetic, COMPRESSED))
    return counts


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 8 bits, uint8 [R, C] → int32 [R, ceil(C * bits / 32)]; the first code in the lowest bits."""
    each = _WORD // bits
    words = F.pad(codes, (0, -codes.shape[1] % each)).view(len(codes), -1, each).long()
    words = (words << (bits * torch.arange(each, device=codes.device))).sum(dim=-1)
    return torch.where(words < 2 ** (_WORD - 1), words, words - 2**_WORD).int()


def _group(module: ModulePlan) -> _Group:
    weight, activation, columns = module.weight, module.activation, module.shape[1]
    if weight.kind != "int":
        reason = f"{weight} is not a weight of integers"
    elif activation.kind != "none":
        if (weight.bits, activation.bits) == (8, 8):
            return _Group(INTEGER, 8, None, True)
        reason = f"w{weight.bits}a{activation.bits} is neither w8a8 nor w4a16 or w8a16"
    elif weight.bits not in (4, 8):
        reason = f"weights of {weight.bits} bits; 4 and 8 can be served"
    else:
        group = weight.group_size if weight.group_size and weight.group_size < columns else None
        if group is None or columns % group == 0:
            return _Group(PACKED, weight.bits, group, weight.symmetric)
        reason = f"groups of {group} do not divide its {columns} input features"
    raise QVLMError(f"--format compressed-tensors cannot express {module.name}: {reason}")


def _compress(module: ModulePlan, group: _Group, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The stored tensors of one Linear, which gets the weight and bias that they stand for."""
    linear = model.get_submodule(module.name)
    weight, dtype = linear.weight.detach(), linear.weight.dtype
    parameters = parameters_of(module, tensors, weight.device)
    if group.format == PACKED:
        fmt = module.weight
        quantized = int_weight(weight, fmt, parameters)
        quantized = replace(quantized, scale=quantized.scale.to(dtype))  # progressive ones are of 32 bits
        rounded = quantized.dequantize()
        stored = {
            "weight_packed": pack_words(quantized.codes, fmt.bits),
            "weight_scale": quantized.scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not fmt.symmetric:
            stored["weight_zero_point"] = pack_words(quantized.zero_point.t(), fmt.bits).t()
    else:
        planned = quantized_values(weight, module.weight, parameters)
        scale = (planned.abs().amax(dim=1, keepdim=True) / 127).to(dtype)
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (planned / scale.float()).round().clamp(-127, 127)
        rounded = codes * scale.float()
        stored = {"weight": codes.to(torch.int8), "weight_scale": scale}
    bias = corrected_bias(weight, rounded, linear.bias, parameters.get("mean"))
    linear.weight = nn.Parameter(rounded.to(dtype), requires_grad=False)
    if bias is not None:
        stored["bias"] = bias.detach()
        linear.bias = nn.Parameter(stored["bias"], requires_grad=False)
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def _configuration(plan: RoundingPlan, groups: Mapping[_Group, list[ModulePlan]]) -> dict[str, Any]:
    formats = {group.format for group in groups}
    ignored = [module.name for module in plan.modules if module.is_identity]
    single = len(groups) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(formats)) if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": group.entry(["Linear"] if single else [module.name for module in members])
            for index, (group, members) in enumerate(groups.items())
        },
        "ignore": ignored,
        "dequantize": not all(group.symmetric for group in groups),
        "qvlm": {**plan.facts, "model": plan.model},
    }
