"""Products of tokens' integer codes with packed 4-bit weights whose scales are whole numbers."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from qvlm_plugin.kernels.int4_product import UnpackedRows, unpacked_tiles
from qvlm_plugin.kernels.int8_product import int8_linear, product_of_codes, scaled
from qvlm_plugin.kernels.operators import operator

FEW_TOKENS = 16
"""Up to this number of tokens, bfloat16 models (on CUDA float16 models, too) use torch's operator for packed weights,
which rounds sums to bfloat16. In float32 it is many times slower on a CPU than unpacking the weight."""


def whole_numbers(packed: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """A weight in its units, ``multiple * (code - zero_point)``, on a CPU some rows at a time: int8 [rows, G, I / G].

    Args:
        packed: the result of `pack_weight` for codes, multiples (as scales) and zero points.

    Yields:
        Parts of the weight, all in the same memory.
    """
    if packed["packed"].device.type == "cuda":
        codes, multiple = unpacked_tiles(packed["packed"], packed["scales_and_zeros"])
        yield codes.mul_(multiple.to(torch.int8).unsqueeze(2))
        return
    unpacked = UnpackedRows.of(packed["packed"], packed["scales_and_zeros"])
    multiple = packed["scales_and_zeros"][..., 0].t().to(torch.int8).contiguous()
    for start in range(0, len(multiple), unpacked.at_once):
        span = slice(start, min(start + unpacked.at_once, len(multiple)))
        yield unpacked[span].mul_(multiple[span].unsqueeze(2))


def _reads_packed(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's operator for packed weights multiplies the codes."""
    on_cuda = codes.device.type == "cuda"
    return len(codes) <= FEW_TOKENS and (dtype == torch.bfloat16 or (on_cuda and dtype == torch.float16))


@operator(
    "int4_codes_linear",
    like=lambda codes, step, offset, packed, pairs, unit, row_sum, bias, dtype: unit.new_empty(
        codes.shape[0], unit.shape[0], dtype=dtype
    ),
    schema="(Tensor codes, Tensor step, Tensor offset, Tensor packed, Tensor scales_and_zeros, Tensor unit, "
    "Tensor row_sum, Tensor? bias, ScalarType dtype) -> Tensor",
    traceable=lambda codes, *others: codes.device.type == "cpu" and _reads_packed(codes, others[-1]),
)
def int4_codes_linear(
    codes: Tensor,
    step: Tensor,
    offset: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    unit: Tensor,
    row_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply tokens ``offset + step * code`` by the transpose of a weight, and add a bias.

    Args:
        codes: int8 [N, I].
        step, offset: float32 [N, 1].
        packed, scales_and_zeros: the weight in its units, see `whole_numbers`.
        unit, row_sum: float32 [O], the weight's units and the sums of its rows.
        bias: [O] or None.
        dtype: dtype of the result.

    Returns:
        [N, O].
    """
    on_cuda = codes.device.type == "cuda"
    if _reads_packed(codes, dtype):
        group, operators = codes.shape[1] // scales_and_zeros.shape[0], torch.ops.aten
        multiply = operators._weight_int4pack_mm if on_cuda else operators._weight_int4pack_mm_for_cpu
        product = multiply(codes.bfloat16(), packed, group, scales_and_zeros)
        return scaled(product, unit, bias, dtype, (step, offset, row_sum))
    if on_cuda:
        weight = next(whole_numbers({"packed": packed, "scales_and_zeros": scales_and_zeros}))
        return scaled(product_of_codes(codes, weight.flatten(1)), unit, bias, dtype, (step, offset, row_sum))
    out, row = unit.new_empty(len(codes), len(unit), dtype=dtype), 0
    for weight in whole_numbers({"packed": packed, "scales_and_zeros": scales_and_zeros}):
        rows = slice(row, row + len(weight))
        part = [weight.flatten(1)], unit[None, rows], None if bias is None else bias[rows]
        out[:, rows] = int8_linear(codes, *part, dtype, step, offset, row_sum[rows])
        row = rows.stop
    return out
