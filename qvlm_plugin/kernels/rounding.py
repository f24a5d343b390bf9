"""Rounding of inputs for packed kernels: the reference's values, with steps computed when weights are packed."""

from collections.abc import Mapping

from torch import Tensor

from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.kernels import fusable, fused
from qvlm_plugin.kernels.reference import round_activation
from qvlm_plugin.kernels.sharing import once
from qvlm_plugin.quantizers import quantization_step, round_to_points


def with_rounding(tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> dict[str, Tensor]:
    """Tensors with bounds of channels, if there are any, replaced by their ``lower``, ``step`` and ``inverse`` [I]."""
    if "upper" not in tensors:
        return dict(tensors)
    others = {name: tensor for name, tensor in tensors.items() if name != "upper"}
    lower, upper = tensors["lower"].float(), tensors["upper"].float()
    step, inverse = quantization_step(lower, upper, activation_format.bits)
    return {**others, "lower": lower, "step": step, "inverse": inverse}


def round_input(x: Tensor, activation_format: ActivationFormat, tensors: Mapping[str, Tensor]) -> Tensor:
    """`round_activation` with the tensors of `with_rounding`, computed `once` for a site's Linears."""
    static = activation_format.kind == "static_channel"
    names = ("lower", "step", "inverse") if static else activation_format.parameters

    def compute() -> Tensor:
        bits = activation_format.bits
        if static:
            points = fused.points_of_channels if fusable.channels(x) else round_to_points
            return points(x, *(tensors[name] for name in names), bits)
        if activation_format.kind == "dynamic_token" and fusable.tokens(x, activation_format.normal):
            return fused.points_of_tokens(x, tensors["clip_ratio"], tensors.get("center"), activation_format)
        return round_activation(x, activation_format, tensors)

    return once(x, tensors, names, ("points", activation_format), compute)
