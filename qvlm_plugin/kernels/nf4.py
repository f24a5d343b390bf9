"""4-bit normal-float weights, packed and multiplied by bitsandbytes; the input is rounded as in the reference.

Codes and block scales are this package's own (`quantizers`), and in bitsandbytes' layout: outputs equal the reference's
up to rounding. The package is imported when a weight is packed, not before.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel, corrected_bias, with_bias, with_parameters
from qvlm_plugin.kernels.nibbles import pack_nibbles, unpack_nibbles
from qvlm_plugin.kernels.rounding import round_input, with_rounding
from qvlm_plugin.quantizers import (
    NF_BLOCK,
    NormalFloatWeight,
    dequantize_scales,
    double_quantize,
    dynamic_codebook,
    normal_float_codebook,
    quantize_normal_float,
)

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BITS = 4

_TILE_ROWS = 32
"""Rows that bitsandbytes' layout for CPUs with bfloat16 instructions keeps together."""


def _obstacle(
    weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
) -> str | None:
    if weight_format.kind != "nf" or weight_format.bits != BITS:
        return f"it is for normal-float weights of {BITS} bits"
    if device.type not in ("cpu", "cuda"):
        return f"no normal-float operator on {device.type}"
    if shape[1] % NF_BLOCK:
        return f"{shape[1]} input features are not a multiple of {NF_BLOCK}"
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed; pip install 'qvlm_plugin[nf]'"
    return None


def _prepare(
    weight: Tensor,
    bias: Tensor | None,
    weight_format: WeightFormat,
    activation_format: ActivationFormat,
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    quantized = quantize_normal_float(weight, BITS, False, parameters.get("clip"))
    tensors = {
        "codes": pack_nibbles(quantized.codes),
        "codebook": normal_float_codebook(BITS).to(weight.device, weight.dtype),
    }
    if weight_format.double_quantization:
        scales = double_quantize(quantized.absmax)
        tensors |= {"scale_codes": scales.codes, "scale": scales.largest, "scale_offset": scales.offset.view(1)}
        quantized = replace(quantized, absmax=scales.dequantize())
    else:
        tensors["scale"] = quantized.absmax
    if "mean" in parameters:
        bias = corrected_bias(weight, quantized.dequantize().to(weight.dtype), bias, parameters["mean"])
    return with_parameters(tensors, bias, activation_format, parameters)


def _pack(
    tensors: Mapping[str, Tensor], activation_format: ActivationFormat, device: torch.device
) -> dict[str, Tensor]:
    packed = with_rounding({name: tensor.to(device) for name, tensor in tensors.items()}, activation_format)
    if "scale_codes" in packed:
        packed["scale_codebook"] = dynamic_codebook().to(device)
    rows, columns = packed["codes"].shape[0], 2 * packed["codes"].shape[1]
    if device.type == "cpu" and packed["codebook"].dtype == torch.bfloat16 and rows % _TILE_ROWS == 0:
        from bitsandbytes import functional

        if functional.has_avx512bf16():
            state = _state(_scales(packed), packed["codebook"], (rows, columns))
            codes, state = functional._convert_weight_packed_for_cpu(packed["codes"].flatten(), state)
            kept = {name: tensor for name, tensor in packed.items() if not name.startswith(("scale", "codes"))}
            return {"codes": codes, "scale": state.absmax, **kept}
    return packed


def _forward(x: Tensor, tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> Tensor:
    rounded = round_input(x, activation_format, tensors).reshape(-1, x.shape[-1])
    codebook = tensors["codebook"]
    output = nf4_linear(rounded.to(codebook.dtype), tensors["codes"], _scales(tensors), codebook)
    return with_bias(output, x, tensors)


def _restore(tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> dict[str, Tensor]:
    codebook, codes = tensors["codebook"], unpack_nibbles(tensors["codes"])
    scales = _scales({"scale_codebook": dynamic_codebook().to(codes.device), **tensors})
    # `codebook` is in the compute type for bitsandbytes; the reference rounds the exact values.
    weight = NormalFloatWeight(codes, scales, BITS).dequantize().to(codebook.dtype)
    return with_parameters({"weight": weight}, tensors.get("bias"), activation_format, tensors)


def _scales(tensors: Mapping[str, Tensor]) -> Tensor:
    """Scales of blocks as products read them: [blocks], or [I / 64, O] in the CPU's layout."""
    if "scale_codes" not in tensors:
        return tensors["scale"]
    return dequantize_scales(*(tensors[name] for name in ("scale_codebook", "scale_codes", "scale", "scale_offset")))


def nf4_linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """Multiply with the transpose of a packed normal-float weight.

    Args:
        x: [N, I].
        codes: uint8 [O, I / 2].
        scale: of the blocks: float32 [O * I / 64] with codes as `pack_nibbles` packs them, bfloat16 [I / 64, O] with
            codes in bitsandbytes' layout for CPUs.
        codebook: [16].

    Returns:
        [N, O] in the dtype of ``x``.
    """
    return (_nf4_linear_operator if torch.compiler.is_compiling() else _nf4_linear)(x, codes, scale, codebook)


def _nf4_linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    if len(x) == 0:
        return x.new_empty(0, len(codes))
    import bitsandbytes

    state = _state(scale, codebook, (len(codes), x.shape[1]))
    if scale.dim() == 2:
        state.packing_format_for_cpu = True
        return bitsandbytes.matmul_4bit(x, codes, quant_state=state)
    return bitsandbytes.matmul_4bit(x, codes.view(1, -1), quant_state=state)


_nf4_linear_operator = torch.library.custom_op("qvlm_plugin::nf4_linear", _nf4_linear, mutates_args=())


@_nf4_linear_operator.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _state(scale: Tensor, codebook: Tensor, shape: tuple[int, int]) -> "QuantState":
    """bitsandbytes' description of a weight."""
    from bitsandbytes.functional import QuantState

    return QuantState(
        scale, shape=torch.Size(shape), code=codebook, blocksize=NF_BLOCK, quant_type="nf4", dtype=codebook.dtype
    )


NF4 = Kernel("nf4", _obstacle, _prepare, _pack, _forward, _restore)
"""4-bit normal-float weights, multiplied in the compute type."""
