"""Weights of 5 to 8 bits in 8-bit containers, and integer products with activation codes.

The plan's rounded weight, uniform or normal-float, is rounded once more to 8 bits with one scale for each output
channel, since torch's integer product sums over all input channels; narrower weights take 8 bits here too. A token's
codes have one scale, which multiplies the product; steps of channels are folded into the weight, which is then split
into segments of channels with similar steps (`folding`, `segments`). Unquantized activations are multiplied in the
compute type.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel, corrected_bias, like_input, with_parameters
from qvlm_plugin.kernels.folding import ENCODING, encode, fold, unfold, with_encoding
from qvlm_plugin.kernels.int8_product import int8_linear, int8_weight_linear, round_to_int8
from qvlm_plugin.kernels.reference import quantized_values
from qvlm_plugin.kernels.segments import segment_widths
from qvlm_plugin.kernels.sharing import once
from qvlm_plugin.kernels.token_codes import token_codes

NARROWEST, WIDEST = 5, 8
"""Bits of a weight's code; for fewer bits, `int4` and `nf4` take less memory."""

LARGEST_CODE = 128
"""Signed 8-bit codes go from -128 to 127."""

SEGMENTS = 2
"""Number of scales of a folded row. At 8 bits, with 8 of 2,048 channels 20 times as large as the others, the relative
output error is 5.5 %, 1.0 %, 0.9 %, 0.9 %, 0.8 % for 1, 2, 3, 4, 8 scales; with steps that vary log-normally, it is
5.0 %, 1.3 %, 0.9 %, 0.8 %, 0.8 % (rounding of activations alone: 0.6 %). Each scale costs about a twentieth of the
product's time with one token."""

_MULTIPLE = 8
"""Sizes of integer products on CUDA are multiples of this; it is small enough for a segment of few massive channels."""

_WIDE, _ALIGNMENT, _ALIASING = 1024, 64, 2048
"""From 1,024 channels on, the CPU's integer product for 2 to 64 tokens is fast at multiples of 64, except multiples of
2,048, where the weight's rows share sets of the cache (measured with 8 tokens and 4,096 rows: 3,888 channels 1.8 ms,
3,904 1.5 ms, 4,096 3.4 ms, 4,160 1.3 ms)."""


def _obstacle(
    weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
) -> str | None:
    if not NARROWEST <= weight_format.bits <= WIDEST:
        return f"it is for weights of {NARROWEST} to {WIDEST} bits"
    if device.type not in ("cpu", "cuda"):
        return f"no 8-bit operator on {device.type}"
    if device.type == "cuda" and (shape[0] % _MULTIPLE or shape[1] % _MULTIPLE):
        return f"{shape[0]} output or {shape[1]} input features are not a multiple of {_MULTIPLE}"
    return None


def _prepare(
    weight: Tensor,
    bias: Tensor | None,
    weight_format: WeightFormat,
    activation_format: ActivationFormat,
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    rounded = quantized_values(weight, weight_format, parameters)
    mean = parameters.get("mean")
    if activation_format.kind == "static_channel":
        bias = corrected_bias(weight, rounded, bias, mean)
        bounds = parameters["lower"], parameters["upper"]
        folded = fold(rounded, bias, *bounds, activation_format.bits, LARGEST_CODE, mean)
        widths = segment_widths(folded.step, SEGMENTS, _MULTIPLE)
        segments = [round_to_int8(part) for part in folded.weight.split(widths, dim=1)]
        stored = torch.cat([codes * scale.unsqueeze(1) for codes, scale in segments], dim=1)
        return {
            **{f"codes_{index}": codes for index, (codes, _) in enumerate(segments)},
            "scale": torch.stack([scale for _, scale in segments]) * folded.multiplier,
            "bias": folded.bias(stored),
            **folded.codes,
        }
    codes, scale = round_to_int8(rounded)
    bias = corrected_bias(weight, codes * scale.unsqueeze(1), bias, mean)
    tensors = {"codes_0": codes, "scale": scale.unsqueeze(0)}
    return with_parameters(tensors, bias, activation_format, parameters)


def _pack(
    tensors: Mapping[str, Tensor], activation_format: ActivationFormat, device: torch.device
) -> dict[str, Tensor]:
    packed = with_encoding({name: tensor.to(device) for name, tensor in tensors.items()})
    if "clip_ratio" in packed:
        packed["row_sum"] = packed["codes_0"].sum(dim=1) * packed["scale"][0]
    if activation_format.centered:  # codes represent distances from the center
        bias = (packed["codes_0"].float() @ packed["center"].float()) * packed["scale"][0]
        packed["bias"] = bias + packed["bias"].float() if "bias" in packed else bias
    return _aligned(packed) if device.type == "cpu" and activation_format.kind != "none" else packed


def _aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run-time tensors with channels of zeros appended to wide segments, up to widths that are fast."""
    segments = _segments(tensors)
    padded = {f"codes_{index}": _pad(codes, _fast_width(codes.shape[1])) for index, codes in enumerate(segments)}
    if "index" in tensors:  # the weight is zero there, so any channel can be read
        parts = tensors["index"].split([codes.shape[1] for codes in segments])
        padded["index"] = torch.cat([_pad(part, _fast_width(len(part))) for part in parts])
    return {**tensors, **padded}


def _fast_width(width: int) -> int:
    if width < _WIDE:
        return width
    aligned = width + -width % _ALIGNMENT
    return aligned if aligned % _ALIASING else aligned + _ALIGNMENT


def _pad(x: Tensor, width: int) -> Tensor:
    """``x`` [..., C] with zeros appended: [..., width]."""
    return F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x


def _forward(x: Tensor, tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    if activation_format.kind == "none":
        output = int8_weight_linear(tokens, tensors["codes_0"], tensors["scale"][0])
        return like_input(output + tensors["bias"] if "bias" in tensors else output, x)
    bits, step, offset, unknown = activation_format.bits, None, None, None
    if activation_format.kind == "static_channel":
        codes, unknown = once(x, tensors, ENCODING, ("codes, NaN", bits), lambda: _channel_codes(x, tensors, bits))
    else:
        codes, step, offset = token_codes(x, tensors, activation_format)
        codes = _pad(codes, tensors["codes_0"].shape[1])
    output = int8_linear(
        codes, _segments(tensors), tensors["scale"], tensors.get("bias"), x.dtype, step, offset, tensors.get("row_sum")
    )
    return like_input(output if unknown is None else output.add_(unknown), x)


def _channel_codes(x: Tensor, tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Codes, see `encode`, and for each token 0 or NaN [N, 1] in the dtype of ``x``: codes cannot be NaN, so an
    overflow in an earlier layer would go unnoticed."""
    sums = x.reshape(-1, x.shape[-1]).sum(dim=-1, keepdim=True, dtype=torch.float32)
    return encode(x, tensors, bits, torch.int8), sums.mul_(0).to(x.dtype)


def _segments(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[f"codes_{index}"] for index in range(len(tensors["scale"]))]


def _restore(tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> dict[str, Tensor]:
    parts = zip(_segments(tensors), tensors["scale"], strict=True)
    weight = torch.cat([codes * scale.unsqueeze(1) for codes, scale in parts], dim=1)
    if activation_format.kind == "static_channel":
        return unfold(weight, tensors, activation_format.bits)
    return with_parameters({"weight": weight}, tensors.get("bias"), activation_format, tensors)


INT8 = Kernel("int8", _obstacle, _prepare, _pack, _forward, _restore, tolerance=0.03)
"""8-bit weights, multiplied by integer codes if activations are quantized."""
