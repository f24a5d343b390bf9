"""How packed kernels round their input: to the reference's values, with less to compute at every call."""

from collections.abc import Mapping

from torch import Tensor

from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.kernels.reference import round_activation
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
    """`round_activation` with tensors of `with_rounding`."""
    if activation_format.kind == "static_channel":
        return round_to_points(x, tensors["lower"], tensors["step"], tensors["inverse"], activation_format.bits)
    return round_activation(x, activation_format, tensors)
