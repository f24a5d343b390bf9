"""4-bit normal-float weights, packed and multiplied by bitsandbytes; the input is rounded as in the reference.

Codes and block scales are computed by this package (`quantizers`), in bitsandbytes' layout, so outputs equal the
reference's up to rounding. For many tokens on a CPU the weight is dequantized some rows at a time; outputs of a
bfloat16 model are then bitwise the reference's. On CUDA, bitsandbytes' operator itself dequantizes for many tokens, and
also dequantizes the scales of doubly quantized weights. bitsandbytes is imported when a weight is packed, not before.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from packaging.version import Version
from torch import Tensor

from qvlm_plugin.formats import NF_BLOCK, SCALE_BLOCK, ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel, corrected_bias, like_input, with_parameters
from qvlm_plugin.kernels.dequantized import product_by_rows, rows_at_once
from qvlm_plugin.kernels.operators import operator
from qvlm_plugin.kernels.rounding import round_input, with_rounding
from qvlm_plugin.packing import pack_codes, unpack_codes
from qvlm_plugin.quantizers import (
    NormalFloatWeight,
    dequantize_scales,
    double_quantize,
    dynamic_codebook,
    normal_float_codebook,
    normal_float_weight,
)

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BITS = 4

_OLDEST = "0.50"
"""Oldest supported version of bitsandbytes, as in setup.cfg."""

FEW_TOKENS = 64
"""Maximum number of tokens, as in a decoding step, that bitsandbytes multiplies on a CPU. With bfloat16 instructions
its product is faster for about 200 more, but computes with scales and a codebook in bfloat16."""

_TILE_ROWS = 32
"""Rows of a tile in bitsandbytes' layout for CPUs with bfloat16 instructions."""


def _obstacle(
    weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
) -> str | None:
    if weight_format.kind != "nf" or weight_format.bits != BITS:
        return f"it is for normal-float weights of {BITS} bits"
    if device.type not in ("cpu", "cuda"):
        return f"no normal-float operator on {device.type}"
    if shape[1] % NF_BLOCK:
        return f"{shape[1]} input features are not a multiple of {NF_BLOCK}"
    return _missing()


@cache
def _missing() -> str | None:
    """Why the installed bitsandbytes cannot be used.

    Before 0.50, its CUDA kernel for one token reads the codebook as float32 whatever its dtype; here it is in the
    compute type.
    """
    install = "pip install 'qvlm_plugin[nf]'"
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        return f"bitsandbytes is not installed; {install}"
    if Version(found) < Version(_OLDEST):
        return f"bitsandbytes {found} is too old, {_OLDEST} is needed; {install}"
    return None


def _prepare(
    weight: Tensor,
    bias: Tensor | None,
    weight_format: WeightFormat,
    activation_format: ActivationFormat,
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    quantized = normal_float_weight(weight, weight_format, parameters, double_quantization=False)
    tensors = {
        "codes": pack_codes(quantized.codes, BITS),
        "codebook": normal_float_codebook(BITS, weight.device).to(weight.dtype, copy=True),
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
        packed["scale_codebook"] = dynamic_codebook(device).clone()
    rows, columns = packed["codes"].shape[0], 2 * packed["codes"].shape[1]
    if device.type == "cpu" and packed["codebook"].dtype == torch.bfloat16 and rows % _TILE_ROWS == 0:
        functional = _bitsandbytes().functional
        if functional.has_avx512bf16():
            state = _state(_scales(packed), packed["codebook"], (rows, columns))
            codes, state = functional._convert_weight_packed_for_cpu(packed["codes"].flatten(), state)
            return {**packed, "codes": codes, "tile_scale": state.absmax}
    return packed


def _forward(x: Tensor, tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> Tensor:
    rounded = round_input(x, activation_format, tensors).reshape(-1, x.shape[-1])
    codes, codebook = tensors["codes"], tensors["codebook"]
    scales = _stored_scales(tensors)
    rest = tensors.get("tile_scale"), tensors.get("bias")
    output = nf4_linear(rounded.to(codebook.dtype), codes, scales, codebook, *rest)
    return like_input(output, x)


def _restore(tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> dict[str, Tensor]:
    codebook, codes = tensors["codebook"], unpack_codes(tensors["codes"], BITS)
    scales = _scales({"scale_codebook": dynamic_codebook(codes.device), **tensors})
    # `codebook` is in the compute type for bitsandbytes; the reference rounds the exact values.
    weight = NormalFloatWeight(codes, scales, BITS).dequantize().to(codebook.dtype)
    return with_parameters({"weight": weight}, tensors.get("bias"), activation_format, tensors)


def _stored_scales(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The blocks' scales as they are stored: one tensor, or the arguments of `dequantize_scales`."""
    doubly = ("scale_codebook", "scale_codes", "scale", "scale_offset")
    return [tensors[name] for name in (doubly if "scale_codes" in tensors else ("scale",))]


def _scales(tensors: Mapping[str, Tensor]) -> Tensor:
    """Scales of the blocks: float32 [blocks]."""
    return _dequantized_scales(_stored_scales(tensors))


def _dequantized_scales(scales: list[Tensor]) -> Tensor:
    return scales[0] if len(scales) == 1 else dequantize_scales(*scales)


@operator(
    "nf4_linear",
    like=lambda x, codes, *_: x.new_empty(x.shape[0], codes.shape[0]),
    schema="(Tensor x, Tensor codes, Tensor[] scales, Tensor codebook, Tensor? tile_scale=None, Tensor? bias=None) "
    "-> Tensor",
)
def nf4_linear(
    x: Tensor,
    codes: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    tile_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply by the transpose of a packed normal-float weight, and add a bias.

    Args:
        x: [N, I].
        codes: uint8 [O, I / 2], as `pack_codes` packs them; with ``tile_scale`` in bitsandbytes' layout for CPUs.
        scales: the blocks' scales: one tensor, float32 [O * I / 64], or the arguments of `dequantize_scales`.
        codebook: [16], in the dtype of ``x``.
        tile_scale: the blocks' scales in bitsandbytes' layout for CPUs: bfloat16 [I / 64, O].
        bias: [O] or None.

    Returns:
        [N, O] in the dtype of ``x``.
    """
    if len(x) == 0:
        return x.new_empty(0, len(codes))
    if x.device.type == "cpu" and len(x) > FEW_TOKENS:
        return _times_dequantized(x, codes, _dequantized_scales(scales), codebook, tile_scale is not None, bias)
    shape, multiply = (len(codes), x.shape[1]), _bitsandbytes().matmul_4bit
    if x.device.type == "cuda":  # the operator itself decides from how many tokens on to dequantize
        return multiply(x, codes, quant_state=_nested_state(scales, codebook, shape), bias=bias)
    if tile_scale is None:
        state = _state(_dequantized_scales(scales), codebook, shape)
        codes = codes.view(1, -1)
    else:
        state = _state(tile_scale, codebook, shape)
        state.packing_format_for_cpu = True
    product = multiply(x, codes, quant_state=state)
    return product if bias is None else product.add_(bias)


def _times_dequantized(
    x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, tiled: bool, bias: Tensor | None
) -> Tensor:
    """`nf4_linear` for many tokens: the product with the reference's weight.

    Args:
        x: [N, I].
        codes: uint8 [O, I / 2], in bitsandbytes' layout for CPUs if ``tiled``.
        scale: float32 [O * I / 64].
        codebook: [16], in the dtype of ``x``; bitsandbytes uses values of its own.
        tiled: whether codes are in bitsandbytes' layout for CPUs.
        bias: [O] or None.
    """
    functional = _bitsandbytes().functional
    rows, columns = len(codes), x.shape[1]
    scale, step = scale.view(rows, -1), rows_at_once(rows, columns, _TILE_ROWS)
    buffers = codes.new_empty(2, step * columns // 2)

    def dequantize(span: slice) -> Tensor:
        part = _untile(codes[span], *buffers) if tiled else codes[span]
        return functional.dequantize_4bit(part, _state(scale[span].flatten(), codebook, (len(part), columns)))

    return product_by_rows(x, rows, step, dequantize, bias)


def _untile(codes: Tensor, by_column: Tensor, out: Tensor) -> Tensor:
    """Codes in bitsandbytes' layout for CPUs, uint8 [O, I / 2] → ``out``, as `pack_codes` packs them.

    A tile has 32 rows. For every two columns it has bytes whose lower halves are codes of the first 16 rows and whose
    upper halves are codes of the last 16, with the two columns of a row side by side. ``by_column`` is a buffer; it and
    ``out`` are uint8 [at least O * I / 2].
    """
    rows, pairs = codes.shape
    half = _TILE_ROWS // 2
    by_column = by_column[: codes.numel()].view(-1, 2, half, pairs)
    by_column.copy_(codes.view(-1, pairs, half, 2).permute(0, 3, 2, 1))
    (even, odd), out = by_column.unbind(1), out[: codes.numel()]
    first, last = out.view(-1, 2, half, pairs).unbind(1)
    torch.bitwise_left_shift(even, 4, out=first)
    torch.bitwise_right_shift(odd, 4, out=last)
    first.bitwise_or_(odd.bitwise_and_(15))
    last.bitwise_or_(even.bitwise_and_(0xF0))
    return out.view(rows, pairs)


def _state(scale: Tensor, codebook: Tensor, shape: tuple[int, int]) -> "QuantState":
    """bitsandbytes' description of a weight."""
    return _bitsandbytes().functional.QuantState(
        scale, shape=torch.Size(shape), code=codebook, blocksize=NF_BLOCK, quant_type="nf4", dtype=codebook.dtype
    )


def _nested_state(scales: list[Tensor], codebook: Tensor, shape: tuple[int, int]) -> "QuantState":
    """`_state` for bitsandbytes' operator on CUDA, which dequantizes doubly quantized ``scales`` itself."""
    if len(scales) == 1:
        return _state(scales[0], codebook, shape)
    values, codes, largest, offset = scales
    state = _state(codes, codebook, shape)
    of_scales = _bitsandbytes().functional.QuantState(largest, code=values, blocksize=SCALE_BLOCK, dtype=torch.float32)
    state.state2, state.offset, state.nested = of_scales, offset.view(()), True
    return state


@cache
def _bitsandbytes() -> ModuleType:
    """The package, without its warning about a kernel from the hub that it does not need."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
    )
    return import_module("bitsandbytes")


NF4 = Kernel("nf4", _obstacle, _prepare, _pack, _forward, _restore)
"""4-bit normal-float weights, multiplied in the compute type."""
