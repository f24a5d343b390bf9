"""Integer codes in both operands: packed 4-bit weights times static per-channel activations.

The activations' steps are folded into the weight, which is then quantized group by group from its original values
(`folding`). The operands are codes; whole numbers up to 256 are exact in every compute type, so products equal those of
an integer unit. Hardware with 4-bit products would compute the same, but this rounds differently from the plan: a scale
shared by channels of different steps costs accuracy, and clipping and codes found for the unfolded weight do not apply.
`int4` is as fast and as small without that loss, and is preferred.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel, like_input
from qvlm_plugin.kernels.folding import ENCODING, encode, fold, unfold, with_encoding
from qvlm_plugin.kernels.int4 import INT4, dequantize_packed
from qvlm_plugin.kernels.int4_product import WIDTH, int4_linear, operator_group
from qvlm_plugin.kernels.sharing import once
from qvlm_plugin.packing import pack_codes
from qvlm_plugin.quantizers import quantize_int

LARGEST_CODE = 256
"""Whole numbers up to this one are exact in bfloat16."""


def _obstacle(
    weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
) -> str | None:
    if activation_format.kind != "static_channel":
        return "it is for static per-channel activations"
    if weight_format.clipped:
        return "clipping does not carry over to folded weights"
    if weight_format.stored:
        return "the plan's codes do not carry over to folded weights"
    return INT4.obstacle(weight_format, activation_format, shape, device)


def _prepare(
    weight: Tensor,
    bias: Tensor | None,
    weight_format: WeightFormat,
    activation_format: ActivationFormat,
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    folded = fold(
        weight,
        bias,
        parameters["lower"],
        parameters["upper"],
        activation_format.bits,
        LARGEST_CODE,
        parameters.get("mean"),
    )
    group = operator_group(weight_format.group_size, weight.shape[1])
    grouped = weight_format.model_copy(update={"group_size": group})
    quantized = quantize_int(folded.weight, grouped, scale_dtype=weight.dtype)
    return {
        "codes": pack_codes(quantized.codes, WIDTH),
        "scale": quantized.scale,
        "zero_point": quantized.zero_point,
        "bias": folded.bias(quantized.dequantize()),
        "multiplier": folded.multiplier.view(1),
        **folded.codes,
    }


def _pack(
    tensors: Mapping[str, Tensor], activation_format: ActivationFormat, device: torch.device
) -> dict[str, Tensor]:
    return with_encoding(INT4.pack(tensors, activation_format, device))


def _forward(x: Tensor, tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> Tensor:
    compute_type = tensors["scales_and_zeros"].dtype
    bits = activation_format.bits
    codes = once(x, tensors, ENCODING, ("codes", bits, compute_type), lambda: encode(x, tensors, bits, compute_type))
    product = int4_linear(codes, tensors["packed"], tensors["scales_and_zeros"])
    output = torch.addcmul(tensors["bias"], product.float(), tensors["multiplier"])
    return like_input(output, x)


def _restore(tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> dict[str, Tensor]:
    return unfold(dequantize_packed(tensors) * tensors["multiplier"], tensors, activation_format.bits)


INT4_FOLDED = Kernel("int4_folded", _obstacle, _prepare, _pack, _forward, _restore, tolerance=0.03)
"""4-bit weights times activation codes."""
