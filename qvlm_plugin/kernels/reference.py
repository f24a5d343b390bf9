"""The paper's arithmetic, quantize-dequantize: weights and inputs are rounded, the product runs in the compute type.

It simulates every format exactly, on every device, but saves neither memory nor time.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel, as_stored, corrected_bias, with_parameters
from qvlm_plugin.kernels.sharing import once
from qvlm_plugin.quantizers import (
    fake_quantize,
    fake_quantize_straight_through,
    int_weight,
    normal_float_weight,
    token_range,
    widen,
)


def round_weight(weight: Tensor, weight_format: WeightFormat, clip: Tensor | None = None) -> Tensor:
    """``weight`` [O, I] rounded to the nearest values of the format, in its own dtype; ``clip`` as in `quantizers`.

    Searches use it; a plan's weights are its `quantized_values`.
    """
    return quantized_values(weight, weight_format, {} if clip is None else {"clip": clip}).to(weight.dtype)


def quantized_values(weight: Tensor, weight_format: WeightFormat, parameters: Mapping[str, Tensor]) -> Tensor:
    """The values that the codes of ``weight`` [O, I] represent, in float32; ``weight`` itself if it is not quantized.

    Args:
        weight: the weight before rounding.
        weight_format: format of the result.
        parameters: the parameters that the format names.
    """
    fmt = weight_format
    if fmt.kind == "int":
        return int_weight(weight, fmt, parameters).dequantize()
    if fmt.kind == "nf":
        return normal_float_weight(weight, fmt, parameters, fmt.double_quantization).dequantize()
    return weight


def round_activation(
    x: Tensor,
    activation_format: ActivationFormat,
    parameters: Mapping[str, Tensor],
    quantize: Callable[[Tensor, Tensor, Tensor, int], Tensor] = fake_quantize,
) -> Tensor:
    """``x`` [..., I] after quantization to the format and back, in its own dtype."""
    if activation_format.kind == "static_channel":
        return quantize(x, parameters["lower"], parameters["upper"], activation_format.bits)
    if activation_format.kind == "dynamic_token":
        values = widen(x) - parameters["center"] if activation_format.centered else x
        bounds = token_range(values, parameters["clip_ratio"], activation_format.reach)
        rounded = quantize(values, *bounds, activation_format.bits)
        return (rounded + parameters["center"]).to(x.dtype) if activation_format.centered else rounded
    return x


def _obstacle(
    weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
) -> None:
    return None


def _prepare(
    weight: Tensor,
    bias: Tensor | None,
    weight_format: WeightFormat,
    activation_format: ActivationFormat,
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    rounded = quantized_values(weight, weight_format, parameters).to(weight.dtype)
    bias = corrected_bias(weight, rounded, bias, parameters.get("mean"))
    return with_parameters({"weight": rounded}, bias, activation_format, parameters)


def _forward(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    activation_format: ActivationFormat,
    quantize: Callable[[Tensor, Tensor, Tensor, int], Tensor] = fake_quantize,
) -> Tensor:
    def compute() -> Tensor:
        return round_activation(x, activation_format, tensors, quantize)

    rounded = once(x, tensors, activation_format.parameters, (activation_format, quantize), compute)
    return F.linear(rounded, tensors["weight"], tensors.get("bias"))


_forward_straight_through = partial(_forward, quantize=fake_quantize_straight_through)


def _restore(tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> dict[str, Tensor]:
    return dict(tensors)


_CAST = ("weight", "bias")

REFERENCE = Kernel("reference", _obstacle, _prepare, as_stored, _forward, _restore, _CAST)
"""Quantize-dequantize on any device, for any format."""

STRAIGHT_THROUGH = Kernel(
    "straight_through", _obstacle, _prepare, as_stored, _forward_straight_through, _restore, _CAST
)
"""The reference's values, differentiable in the input and the activation parameters; for methods that train these."""
