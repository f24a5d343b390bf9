"""Integer weights of up to 4 bits, packed two to a byte; the input is rounded as in the reference arithmetic.

The operators multiply in the compute type, so they get rounded inputs instead of integer codes. The outputs equal the
reference's for every kind of activation: bitwise for many tokens on a CPU, otherwise up to rounding to the compute
type.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel, corrected_bias, like_input, with_parameters
from qvlm_plugin.kernels.int4_product import (
    WIDTH,
    groups_of_operator,
    int4_linear,
    obstacle_of_product,
    operator_group,
    pack_weight,
)
from qvlm_plugin.kernels.rounding import round_input, with_rounding
from qvlm_plugin.packing import pack_codes, unpack_codes
from qvlm_plugin.quantizers import IntWeight, int_weight


def _obstacle(
    weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
) -> str | None:
    if weight_format.kind != "int" or weight_format.bits > WIDTH:
        return f"it is for integer weights of up to {WIDTH} bits"
    if reason := obstacle_of_product(*shape, device):
        return reason
    if operator_group(weight_format.group_size, shape[1]) is None:
        return f"groups of {weight_format.group_size} input channels are not a multiple of 32"
    return None


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
        "scale": quantized.scale[:, of_group].to(weight.dtype),
        "zero_point": quantized.zero_point[:, of_group],
    }
    return with_parameters(tensors, bias, activation_format, parameters)


def _pack(
    tensors: Mapping[str, Tensor], activation_format: ActivationFormat, device: torch.device
) -> dict[str, Tensor]:
    kept = with_rounding({name: tensor.to(device) for name, tensor in tensors.items()}, activation_format)
    weight = (kept.pop(name) for name in ("codes", "scale", "zero_point"))
    return {**pack_weight(*weight, device), **kept}


def _forward(x: Tensor, tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> Tensor:
    rounded = round_input(x, activation_format, tensors)
    operands = (tensors[name] for name in ("packed", "scales_and_zeros"))
    output = int4_linear(rounded.reshape(-1, x.shape[-1]), *operands, tensors.get("bias"))
    return like_input(output, x)


def dequantize_packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that neutral ``codes``, ``scale`` and ``zero_point`` represent: float32 [O, I]."""
    codes, scale = unpack_codes(tensors["codes"], WIDTH), tensors["scale"]
    return IntWeight(codes, scale, tensors["zero_point"], codes.shape[1] // scale.shape[1]).dequantize()


def _restore(tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> dict[str, Tensor]:
    weight = dequantize_packed(tensors).to(tensors["scale"].dtype)
    return with_parameters({"weight": weight}, tensors.get("bias"), activation_format, tensors)


INT4 = Kernel("int4", _obstacle, _prepare, _pack, _forward, _restore)
"""4-bit weights, multiplied in the compute type."""
