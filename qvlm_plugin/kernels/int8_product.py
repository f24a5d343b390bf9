"""Products with 8-bit weights: of integer codes, and of inputs in the compute type."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qvlm_plugin.kernels import fusable, fused
from qvlm_plugin.kernels.dequantized import product_by_rows, rows_at_once
from qvlm_plugin.kernels.operators import operator
from qvlm_plugin.quantizers import by_rows, largest_magnitude

FEW_TOKENS = 16
"""Up to this number of tokens, torch's operator for 8-bit weights is used (measured on a CPU at 2048 x 2048, bfloat16,
AVX-512, one thread: 0.11 ms per token; dequantizing 0.9 ms and then 0.05 ms per token). CUDA's operator reads the
weight once for every 16 tokens.

Up to this number of tokens, the weight is the left operand of a CPU's integer product, for more tokens the right one
(measured with AVX-512, two threads, at 3072 x 576 and 4096 x 4096: one token 0.06 against 0.17 ms and 0.58 against 0.87
ms, 16 tokens the same, 64 tokens 0.31 against 0.14 ms and 1.2 against 1.05 ms)."""

_TOKENS, _OUTPUTS = 640, 2**19
"""Maximum numbers of tokens and of outputs of one product on a CPU: 2 MB of float32. Larger temporaries get new memory
at each call, which costs more than the arithmetic; with fewer tokens, weights are read too often."""

_ROWS = 256
"""Rows of the weight in one product on a CPU are a multiple of this: with AMX a tenth faster than other numbers."""

_CUDA_ROWS = 17
"""Minimum number of tokens of torch's integer product on CUDA."""


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest symmetric 8-bit codes, int8 [O, I], and the scale of each row, float32 [O]."""
    weight = weight.float()
    scale = largest_magnitude(weight) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return by_rows(lambda rows, scale: (rows / scale).round_(), weight, (scale.unsqueeze(1),), torch.int8), scale


def _few_on_cpu(codes: Tensor, *_: object) -> bool:
    return codes.device.type == "cpu" and len(codes) <= FEW_TOKENS


@operator(
    "int8_linear",
    like=lambda codes, weights, scale, bias, dtype, *_: scale.new_empty(codes.shape[0], scale.shape[1], dtype=dtype),
    schema="(Tensor codes, Tensor[] weights, Tensor scale, Tensor? bias, ScalarType dtype, Tensor? step=None, "
    "Tensor? offset=None, Tensor? row_sum=None) -> Tensor",
    traceable=_few_on_cpu,
)
def int8_linear(
    codes: Tensor,
    weights: list[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    step: Tensor | None = None,
    offset: Tensor | None = None,
    row_sum: Tensor | None = None,
) -> Tensor:
    """Sum of integer products over segments of input channels, each with weight scales of its own.

    Args:
        codes: codes of the inputs, int8 [N, I].
        weights: the segments' weights, int8 [O, channels of the segment]; the channels sum to I.
        scale: float32 [segments, O].
        bias: [O] or None.
        dtype: dtype of the result.
        step, offset: float32 [N, 1] for tokens ``offset + step * code``; None if tokens equal their codes.
        row_sum: float32 [O], sums of the weight's rows; needed with ``offset``.

    Returns:
        [N, O]; each segment's sums are exact, and scaled and added in float32.
    """
    count, rows = len(codes), scale.shape[1]
    if fusable.products(codes, dtype, len(weights)):
        steps = None if step is None else (step, offset, row_sum)
        return fused.multiply_codes(codes, weights, scale, bias, dtype, steps)
    parts = [codes]
    if len(weights) > 1:
        parts = [part.contiguous() for part in codes.split([weight.shape[1] for weight in weights], dim=1)]
    if codes.device.type != "cpu" or (count <= _TOKENS and count * rows <= _OUTPUTS):
        total = _scaled_sum(parts, weights, scale.unbind())
        return finished(total, bias, step, offset, row_sum).to(dtype)
    out = scale.new_empty(count, rows, dtype=dtype)
    row_step = max(1, _OUTPUTS // min(count, _TOKENS) // _ROWS) * _ROWS
    for row in range(0, rows, row_step):
        of_rows = slice(row, row + row_step)
        part_weights, part_scales = [weight[of_rows] for weight in weights], scale[:, of_rows].unbind()
        part_bias, part_sums = (None if tensor is None else tensor[of_rows] for tensor in (bias, row_sum))
        for token in range(0, count, _TOKENS):
            of_tokens = slice(token, token + _TOKENS)
            total = _scaled_sum([part[of_tokens] for part in parts], part_weights, part_scales)
            steps = (None if tensor is None else tensor[of_tokens] for tensor in (step, offset))
            out[of_tokens, of_rows] = finished(total, part_bias, *steps, part_sums)
    return out


def _scaled_sum(parts: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Exact products of segments, scaled and added in float32: [N, O]."""
    total = product_of_codes(parts[0], weights[0]).float().mul_(scales[0])  # int32 times float32 takes 10 times as long
    for part, weight, scale in zip(parts[1:], weights[1:], scales[1:], strict=True):
        total.addcmul_(product_of_codes(part, weight).float(), scale)
    return total


def product_of_codes(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact product of int8 [N, I] and the transpose of int8 [O, I]: int32 [N, O]."""
    if codes.device.type == "cuda" and len(codes) < _CUDA_ROWS:
        return torch._int_mm(F.pad(codes, (0, 0, 0, _CUDA_ROWS - len(codes))), weight.t())[: len(codes)]
    if _few_on_cpu(codes):
        return torch._int_mm(weight, codes.t()).t().contiguous()
    return torch._int_mm(codes, weight.t())


def scaled(
    product: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    steps: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The product of the values that codes represent: [N, O] in ``dtype``, computed in float32.

    Args:
        product: product of codes, [N, O]; overwritten if it is float32.
        scale: scales of the weight's rows, float32 [O].
        bias: [O] or None.
        dtype: dtype of the result.
        steps: ``step``, ``offset`` and ``row_sum``, see `int8_linear`.
    """
    if fusable.scaling(product, dtype):
        return fused.scale_product(product, scale, bias, dtype, steps)
    return finished(product.float().mul_(scale), bias, *steps).to(dtype)


def finished(
    total: Tensor, bias: Tensor | None, step: Tensor | None, offset: Tensor | None, row_sum: Tensor | None
) -> Tensor:
    """Turn products of codes [N, O] into products of the values that the codes represent, in place; adds the bias."""
    if offset is not None:
        total.mul_(step).addcmul_(offset, row_sum)
    return total if bias is None else total.add_(bias)


@operator("int8_weight_linear", like=lambda x, weight, scale: x.new_empty(x.shape[0], weight.shape[0]))
def int8_weight_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply inputs in the compute type by the transpose of an 8-bit weight.

    Args:
        x: [N, I].
        weight: int8 [O, I].
        scale: float32 [O].

    Returns:
        [N, O] in the dtype of ``x``.
    """
    if 0 < len(x) <= FEW_TOKENS and x.device.type in ("cpu", "cuda"):
        operand_scale = scale.to(x.dtype) if x.device.type == "cpu" else scale
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, operand_scale)
    if x.device.type != "cpu":
        return F.linear(x, torch.mul(weight, scale.unsqueeze(1), out=x.new_empty(weight.shape)))
    step, scale = rows_at_once(*weight.shape, 1), scale.to(x.dtype).unsqueeze(1)
    part = x.new_empty(step, weight.shape[1])

    def dequantize(span: slice) -> Tensor:
        return part[: span.stop - span.start].copy_(weight[span]).mul_(scale[span])

    return product_by_rows(x, len(weight), step, dequantize, None)
