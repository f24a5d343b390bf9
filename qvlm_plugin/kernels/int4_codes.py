"""Integer weights of up to 4 bits with progressive scales, multiplied with the integer codes of tokens.

A weight is ``unit · multiple · (code - zero_point)``, where each output channel has a unit and each of its groups a
multiple. A multiple times a code is an integer of 8 bits, so one integer product serves all groups. It is exact; units
and the tokens' steps scale its result in float32.

Models in 16 bits keep the weight packed at 4 bits. In float32 torch has no fast operator for packed weights on CPUs,
and unpacking the weight for every token takes several times as long as a product in full precision; there it is kept as
8-bit integers, a quarter of float32's bytes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel, corrected_bias, like_input, with_parameters
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_integers import int4_codes_linear, whole_numbers
from qvlm_plugin.kernels.int4_product import WIDTH, groups_of_operator, pack_weight
from qvlm_plugin.kernels.int8_product import int8_linear
from qvlm_plugin.kernels.token_codes import token_codes
from qvlm_plugin.packing import pack_codes, unpack_codes
from qvlm_plugin.quantizers import IntWeight, int_weight


def _obstacle(
    weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
) -> str | None:
    if not weight_format.progressive:
        return "it is for integer weights with progressive scales"
    if activation_format.kind != "dynamic_token":
        return "it is for activations that are rounded per token"
    return INT4.obstacle(weight_format, activation_format, shape, device)


def _prepare(
    weight: Tensor,
    bias: Tensor | None,
    weight_format: WeightFormat,
    activation_format: ActivationFormat,
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    quantized = int_weight(weight, weight_format, parameters)
    if "mean" in parameters:
        bias = corrected_bias(weight, quantized.dequantize().to(weight.dtype), bias, parameters["mean"])
    of_group = groups_of_operator(quantized)
    tensors = {
        "codes": pack_codes(quantized.codes, WIDTH),
        "unit": quantized.unit,
        "multiple": quantized.multiples[:, of_group],
        "zero_point": quantized.zero_point[:, of_group],
    }
    return with_parameters(tensors, bias, activation_format, parameters)


def _pack(
    tensors: Mapping[str, Tensor], activation_format: ActivationFormat, device: torch.device
) -> dict[str, Tensor]:
    kept = {name: tensor.to(device) for name, tensor in tensors.items()}
    codes, multiple, zero_point = (kept.pop(name) for name in ("codes", "multiple", "zero_point"))
    in_bytes = device.type == "cpu" and kept["unit"].dtype == torch.float32
    unit = kept["unit"] = kept["unit"].float().squeeze(1)
    # The operator gets whole numbers as scales, which are exact in bfloat16.
    packed = pack_weight(codes, multiple.bfloat16(), zero_point, device)
    center = kept["center"].float() if activation_format.centered else None
    sums, products, integers = [], [], []
    for part in whole_numbers(packed):
        rows = part.flatten(1)
        sums.append(part.sum(dim=(1, 2)))
        products += [] if center is None else [rows.float() @ center]
        integers += [rows.clone()] if in_bytes else []
    kept["row_sum"] = torch.cat(sums) * unit
    if center is not None:  # codes represent distances from the center
        bias = torch.cat(products) * unit
        kept["bias"] = bias + kept["bias"].float() if "bias" in kept else bias
    return {**({"integers": torch.cat(integers)} if in_bytes else packed), **kept}


def _forward(x: Tensor, tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> Tensor:
    codes, step, offset = token_codes(x, tensors, activation_format)
    unit, row_sum, bias = tensors["unit"], tensors["row_sum"], tensors.get("bias")
    if "integers" in tensors:
        weight = [tensors["integers"]], unit.unsqueeze(0)
        return like_input(int8_linear(codes, *weight, bias, x.dtype, step, offset, row_sum), x)
    weight = tensors["packed"], tensors["scales_and_zeros"]
    return like_input(int4_codes_linear(codes, step, offset, *weight, unit, row_sum, bias, x.dtype), x)


def _restore(tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> dict[str, Tensor]:
    codes, unit = unpack_codes(tensors["codes"], WIDTH), tensors["unit"]
    scale = unit.float() * tensors["multiple"]
    weight = IntWeight(codes, scale, tensors["zero_point"], codes.shape[1] // scale.shape[1]).dequantize()
    return with_parameters({"weight": weight.to(unit.dtype)}, tensors.get("bias"), activation_format, tensors)


INT4_CODES = Kernel("int4_codes", _obstacle, _prepare, _pack, _forward, _restore)
"""4-bit weights and codes of tokens, multiplied as integers."""
