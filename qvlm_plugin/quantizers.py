"""Quantizers as plain functions: tensors in, codes and parameters out.

Three families:

* uniform affine ranges for activations (static per channel, or dynamic per token), with real-valued bounds;
* uniform integers for weights, per group of input channels or per output channel;
* normal-float codebooks for weights (QLoRA's NF4 at 4 bits; the same construction at other widths), with optional
  double quantization of the block scales.

All arithmetic is in float32, so half-precision inputs neither overflow nor lose code points. Differentiable functions
keep float64 inputs in float64, so that gradients can be checked against finite differences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qvlm_plugin.formats import LARGEST_PRODUCT, NF_BLOCK, SCALE_BLOCK, WeightFormat
from qvlm_plugin.packing import pack_codes, unpack_codes

# Activations


def fake_quantize(x: Tensor, lower: Tensor, upper: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits evenly spaced points from ``lower`` to ``upper``, and back.

    The code of an element is ``clamp(round((x - lower) / step), 0, 2^bits - 1)`` with
    ``step = (upper - lower) / (2^bits - 1)``. Where the bounds coincide the result is that bound: a channel that was
    constant in calibration is reproduced exactly.

    Args:
        x: any floating-point tensor.
        lower, upper: bounds that broadcast against ``x``: [C] per channel, [..., 1] per token.
        bits: 2 to 8.

    Returns:
        The rounded values, in the shape and dtype of ``x``.
    """
    lower = lower.float()
    return round_to_points(x, lower, *quantization_step(lower, upper.float(), bits), bits)


def round_to_points(x: Tensor, lower: Tensor, step: Tensor, inverse: Tensor, bits: int) -> Tensor:
    """`fake_quantize` with the step and its inverse given (float32, see `quantization_step`)."""

    def rounded(x: Tensor, lower: Tensor, step: Tensor, inverse: Tensor) -> Tensor:
        return round_to_codes(x, lower, inverse, bits).mul_(step).add_(lower)

    return by_rows(rounded, x, (lower, step, inverse), x.dtype)


def round_to_codes(x: Tensor, lower: Tensor, inverse: Tensor, bits: int, in_place: bool = False) -> Tensor:
    """The codes of `fake_quantize`: whole numbers in float32, in a new tensor or in that of a float32 ``x``."""
    keeps_x = x.dtype == torch.float32 and not in_place
    distance = x.sub(lower) if keeps_x else x.float().sub_(lower)
    return distance.mul_(inverse).round_().clamp_(0, 2**bits - 1)


_SLICE = 2**20
"""Number of elements computed at a time on a CPU: 4 MB of float32. The C library allocates larger temporaries again at
every call, which costs more than the arithmetic."""


def by_rows(compute: Callable[..., Tensor], x: Tensor, bounds: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """``compute(x, *bounds)`` in ``dtype``, for functions of single elements or rows; on CPUs some rows at a time.

    Args:
        compute: function whose result has the shape of ``x``.
        x: [..., C].
        bounds: [C] or [..., 1]; other shapes that broadcast against ``x`` are computed in one piece.
        dtype: dtype of the result.
    """
    if x.device.type != "cpu" or x.numel() <= _SLICE or torch.compiler.is_compiling():
        return compute(x, *bounds).to(dtype)
    if any(bound.dim() > 1 and bound.shape != (*x.shape[:-1], 1) for bound in bounds):
        return compute(x, *bounds).to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    out, count = torch.empty_like(rows, dtype=dtype), max(1, _SLICE // x.shape[-1])
    bounds = [bound if bound.dim() < 2 else bound.reshape(-1, 1) for bound in bounds]
    for start in range(0, len(rows), count):
        part = slice(start, start + count)
        out[part].copy_(compute(rows[part], *(bound if bound.dim() < 2 else bound[part] for bound in bounds)))
    return out.view(x.shape)


def fake_quantize_straight_through(x: Tensor, lower: Tensor, upper: Tensor, bits: int) -> Tensor:
    """`fake_quantize` for training: the same values, and gradients as if nothing were rounded inside the range.

    Gradients reach ``x`` where it is inside the bounds (the straight-through estimator), and the bounds both where they
    clip and through the step (as in LSQ+).
    """
    lower, upper = widen(lower), widen(upper)
    step, inverse = quantization_step(lower, upper, bits)
    codes = straight_through_round(((widen(x) - lower) * inverse).clamp(0, 2**bits - 1))
    return (codes * step + lower).to(x.dtype)


def quantization_step(lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The distance between neighbouring points, and its inverse; the inverse of 0 is 0."""
    step = (upper - lower) / (2**bits - 1)
    return step, torch.where(step > 0, 1 / step.clamp_min(torch.finfo(step.dtype).tiny), 0)


class _StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


def straight_through_round(x: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return _StraightThroughRound.apply(x)


def widen(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shrink_range(lower: Tensor, upper: Tensor, center: Tensor, ratio: float | Tensor) -> tuple[Tensor, Tensor]:
    """Pull both bounds towards ``center`` (between them) by ``ratio`` in (0, 1]; 1 keeps the bounds, up to rounding.

    Shrinking about the mean keeps the rule independent of a channel's offset.
    """
    return center + (lower - center) * ratio, center + (upper - center) * ratio


def through_zero(lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Both bounds shifted by the same amount, half a step at most, so that 0 is one of the 2^bits points; float32.

    Bounds on one side of 0 stay as they are. Without the shift, in a channel that is close to 0 at all tokens but one
    massive one, every other token has an error of up to half a step of the wide range.
    """
    lower, upper = lower.float(), upper.float()
    step, inverse = quantization_step(lower, upper, bits)
    zero_code = (-lower * inverse).round()
    inside = (lower < 0) & (upper > 0)
    return torch.where(inside, -zero_code * step, lower), torch.where(inside, (2**bits - 1 - zero_code) * step, upper)


def token_range(x: Tensor, clip_ratio: float | Tensor = 1.0, reach: float | None = None) -> tuple[Tensor, Tensor]:
    """Bounds of each token: its extremes, pulled towards its mean (Outlier Suppression's dynamic rule).

    Args:
        x: [..., C].
        clip_ratio: positive scalar; at most 1 without ``reach``.
        reach: bounds are ``reach * clip_ratio`` standard deviations of the token from its mean, and at most its
            extremes, see `ActivationFormat.normal`.

    Returns:
        lower, upper: [..., 1] float32.
    """
    x = widen(x)
    lower, upper = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)  # on CPUs 10 times as fast as aminmax
    mean = x.mean(dim=-1, keepdim=True)
    if reach is None:
        return shrink_range(lower, upper, mean, clip_ratio)
    # The norm is six times as fast as Tensor.std on CPUs.
    deviation = torch.linalg.vector_norm(x - mean, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    distance = deviation * (reach * clip_ratio)
    return torch.maximum(lower, mean - distance), torch.minimum(upper, mean + distance)


# Integer weights


@dataclass(frozen=True, eq=False)
class IntWeight:
    """A weight [O, I] as integers; G = ceil(I / group_size) groups of input channels, the last possibly shorter.

    Attributes:
        codes: uint8 [O, I], 0 to 2^bits - 1.
        scale: [O, G], positive, in the weight's dtype, as in files (`WeightFormat.effective_bits` counts 16 bits);
            float32 if scales are progressive.
        zero_point: uint8 [O, G], the code that represents 0.
        group_size: input channels per group.
        unit: if scales are progressive: [O, 1], in the weight's dtype; scales are whole multiples of it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int
    unit: Tensor | None = None

    @property
    def multiples(self) -> Tensor:
        """The scales as multiples of ``unit``: uint8 [O, G]."""
        return (self.scale / self.unit.float()).round().to(torch.uint8)

    def dequantize(self) -> Tensor:
        """``scale * (codes - zero_point)``: float32 [O, I]."""
        rows, columns = self.codes.shape
        groups = _pad_to_multiple(self.codes, self.group_size).view(rows, -1, self.group_size)
        bounds = self.scale.float().unsqueeze(-1), self.zero_point.float().unsqueeze(-1)

        def values(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
            return codes.float().sub_(zero_point).mul_(scale)

        return by_rows(values, groups, bounds, torch.float32).view(rows, -1)[:, :columns].contiguous()


def quantize_int(
    weight: Tensor, weight_format: WeightFormat, clip: Tensor | None = None, scale_dtype: torch.dtype | None = None
) -> IntWeight:
    """Round-to-nearest uniform quantization of a weight.

    Args:
        weight: [O, I], any floating-point dtype.
        weight_format: a format of kind ``int``.
        clip: [O, G] factors in (0, 1] that narrow the groups' ranges; values beyond saturate.
        scale_dtype: dtype to which scales are rounded before codes are computed; None: the weight's.
    """
    scale_dtype = scale_dtype or weight.dtype
    rows, columns = weight.shape
    bits, size = weight_format.bits, min(weight_format.group_size or columns, columns)
    groups = _pad_to_multiple(weight.float(), size).view(rows, -1, size)
    levels, narrowed = 2**bits - 1, 1.0 if clip is None else clip.float()
    if weight_format.symmetric:
        middle = 2 ** (bits - 1)
        scale = _stored_scale(largest_magnitude(groups) * narrowed / (middle - 1), scale_dtype)
        zero_point = torch.full_like(scale, middle)
    else:
        lower, upper = groups.amin(dim=-1).clamp_max(0), groups.amax(dim=-1).clamp_min(0)
        if clip is not None and weight_format.clip_magnitude:
            limit = torch.maximum(upper, -lower) * narrowed
            lower, upper = torch.maximum(lower, -limit), torch.minimum(upper, limit)
        else:
            lower, upper = lower * narrowed, upper * narrowed
        scale = _stored_scale((upper - lower) / levels, scale_dtype)
        zero_point = (-lower / scale).round().clamp(0, levels)
    unit = None
    if weight_format.progressive:
        unit, multiples = _progressive(scale, zero_point, levels, scale_dtype)
        scale, scale_dtype = unit.float() * multiples, torch.float32

    def codes_of(groups: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (groups / scale).round_().add_(zero_point).clamp_(0, levels)

    codes = by_rows(codes_of, groups, (scale.unsqueeze(-1), zero_point.unsqueeze(-1)), torch.uint8)
    codes = codes.view(rows, -1)[:, :columns].contiguous()
    return IntWeight(codes, scale.to(scale_dtype), zero_point.to(torch.uint8), size, unit)


def _progressive(scale: Tensor, zero_point: Tensor, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The unit of each output channel [O, 1] in ``dtype``, and the multiples of it nearest to the scales [O, G].

    The unit is the smallest for which ``multiple * (code - zero_point)`` fits 8 bits for every code.
    """
    limit = LARGEST_PRODUCT // torch.maximum(zero_point, levels - zero_point)
    unit = _stored_scale((scale / limit).amax(dim=1, keepdim=True), dtype)
    return unit.to(dtype), (scale / unit).round().clamp_min(1).minimum(limit)


def int_weight(weight: Tensor, weight_format: WeightFormat, parameters: Mapping[str, Tensor]) -> IntWeight:
    """A weight as integers: from the plan's codes if the format is ``stored``, else rounded to nearest.

    Args:
        weight: [O, I], after the plan's folds and rotations; its dtype is that of the scales.
        weight_format: a format of kind ``int``.
        parameters: the tensors that the format names.
    """
    fmt = weight_format
    if not fmt.stored:
        return quantize_int(weight, fmt, parameters.get("clip"))
    columns, unit = weight.shape[1], None
    if fmt.progressive:
        unit = parameters["units"].to(weight.dtype)
        scale = unit.float() * parameters["multiples"]
    else:
        scale = parameters["scales"].to(weight.dtype)
    codes = unpack_codes(parameters["codes"], fmt.bits, columns)
    middle = torch.full_like(scale, 2 ** (fmt.bits - 1), dtype=torch.uint8)
    zero_point = middle if fmt.symmetric else parameters["zero_points"]
    return IntWeight(codes, scale, zero_point, min(fmt.group_size or columns, columns), unit)


def nearest_codes(
    weight: Tensor, weight_format: WeightFormat, clip: Tensor | None = None
) -> "IntWeight | NormalFloatWeight":
    """A weight rounded to the nearest values of its format, without double quantization of block scales."""
    fmt = weight_format
    if fmt.kind == "nf":
        return quantize_normal_float(weight, fmt.bits, False, clip)
    return quantize_int(weight, fmt, clip)


def stored_parameters(quantized: "IntWeight | NormalFloatWeight", weight_format: WeightFormat) -> dict[str, Tensor]:
    """The parameters of a stored format, which `int_weight` and `normal_float_weight` read: codes and their scales.

    Block scales are those before double quantization.
    """
    values = {"codes": pack_codes(quantized.codes, weight_format.bits)}
    if isinstance(quantized, IntWeight):
        values |= {"scales": quantized.scale, "zero_points": quantized.zero_point}
        if quantized.unit is not None:
            values |= {"units": quantized.unit, "multiples": quantized.multiples}
    else:
        values |= {"absmax": quantized.absmax}
    return {name: values[name] for name in weight_format.parameters}


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """``x`` [..., C] padded to a multiple of columns with its last column, which keeps the last group's extremes."""
    missing = -x.shape[-1] % multiple
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1) if missing else x


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest magnitude of each row, without a temporary of the size of ``x``: [..., C] → [...]."""
    return torch.maximum(x.amax(dim=-1), -x.amin(dim=-1))


def _stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to ``dtype``, in float32; 1 for those that round to 0."""
    scale = scale.to(dtype).float()
    return torch.where(scale > 0, scale, 1.0)


# Normal-float weights


@dataclass(frozen=True, eq=False)
class NormalFloatWeight:
    """A weight [O, I] in a normal-float data type; blocks of `NF_BLOCK` run along the flattened weight.

    Attributes:
        codes: uint8 [O, I], indices into `normal_float_codebook`.
        absmax: float32 [ceil(O * I / NF_BLOCK)], the block scales; dequantized ones under double quantization.
        bits: width of the codebook.
    """

    codes: Tensor
    absmax: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """``codebook[codes] * absmax``, with the absmax of each block: float32 [O, I]."""
        codebook = normal_float_codebook(self.bits, self.codes.device)
        blocks = _pad_to_multiple(self.codes.flatten(), NF_BLOCK).view(-1, NF_BLOCK)

        def values(codes: Tensor, absmax: Tensor) -> Tensor:
            return codebook[codes.int()].mul_(absmax)

        flat = by_rows(values, blocks, (self.absmax.unsqueeze(1),), torch.float32).flatten()
        return flat[: self.codes.numel()].view(self.codes.shape)


_CPU = torch.device("cpu")


# Codebooks are computed once and shared by all weights. The first call may come in inference mode, whose tensors cannot
# take part in gradients, or while transformers constructs a model, with other default devices and dtypes.


@cache
@torch.inference_mode(False)
def normal_float_codebook(bits: int, device: torch.device = _CPU) -> Tensor:
    """The k-bit NormalFloat values (QLoRA, Eq. 4 and appendix E): quantiles of N(0, 1), exact zero, scaled to [-1, 1].

    Intermediate values are rounded as in QLoRA's code, so that at 4 bits the codebook equals NF4 bit for bit.

    Returns:
        float32 [2^bits] on ``device``, ascending. All callers get the same tensor: copy it before you register or
        change it.
    """
    half = 2 ** (bits - 1)
    # The outermost quantile lies between the centres of the last bins of a 2^k and a 2^k - 1 level quantizer.
    tail = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)
    levels = (torch.linspace(tail, 0.5, count, dtype=torch.float32, device=_CPU)[:-1] for count in (half + 1, half))
    positive, negative = (torch.special.ndtri(level.double()).float() for level in levels)
    values = torch.cat([positive, positive.new_zeros(1), -negative]).sort().values
    return (values / values.max()).to(device)


def quantize_normal_float(
    weight: Tensor, bits: int, double_quantization: bool, clip: Tensor | None = None
) -> NormalFloatWeight:
    """Quantize each block of `NF_BLOCK` weights to the codebook, scaled by the block's largest magnitude.

    Args:
        weight: [O, I], any floating-point dtype.
        bits: 2 to 8.
        double_quantization: also quantize the block scales to 8 bits (`double_quantize`).
        clip: one factor in (0, 1] for each block that narrows its scale; values beyond saturate.
    """
    blocks = _pad_to_multiple(weight.float().flatten(), NF_BLOCK).view(-1, NF_BLOCK)
    absmax = largest_magnitude(blocks) * (1.0 if clip is None else clip.float().flatten())
    codebook = normal_float_codebook(bits, weight.device)

    def codes_of(blocks: Tensor, absmax: Tensor) -> Tensor:
        return _nearest(blocks / absmax, codebook)

    codes = by_rows(codes_of, blocks, (torch.where(absmax > 0, absmax, 1.0).unsqueeze(1),), torch.uint8)
    codes = codes.flatten()[: weight.numel()].view(weight.shape)
    return NormalFloatWeight(codes, double_quantize(absmax).dequantize() if double_quantization else absmax, bits)


def normal_float_weight(
    weight: Tensor, weight_format: WeightFormat, parameters: Mapping[str, Tensor], double_quantization: bool
) -> NormalFloatWeight:
    """A weight in normal-float: from the plan's codes if the format is ``stored``, else rounded to nearest.

    Args:
        weight: [O, I], after the plan's folds and rotations.
        weight_format: a format of kind ``nf``.
        parameters: the tensors that the format names.
        double_quantization: whether to quantize the block scales here; a kernel that does so itself passes False.
    """
    fmt = weight_format
    if not fmt.stored:
        return quantize_normal_float(weight, fmt.bits, double_quantization, parameters.get("clip"))
    absmax = parameters["absmax"].float()
    codes = unpack_codes(parameters["codes"], fmt.bits, weight.shape[1])
    return NormalFloatWeight(codes, double_quantize(absmax).dequantize() if double_quantization else absmax, fmt.bits)


@dataclass(frozen=True, eq=False)
class BlockScales:
    """Block scales in 8 bits.

    Attributes:
        codes: uint8 [N], indices into `dynamic_codebook`.
        largest: float32 [ceil(N / SCALE_BLOCK)], the second-level scales.
        offset: float32 [], the mean that was subtracted from all scales.
    """

    codes: Tensor
    largest: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """The block scales: float32 [N]."""
        return dequantize_scales(dynamic_codebook(self.codes.device), self.codes, self.largest, self.offset)


def dequantize_scales(codebook: Tensor, codes: Tensor, largest: Tensor, offset: Tensor) -> Tensor:
    """``codebook[codes] * largest + offset``, see `BlockScales`: float32 [N]."""
    return codebook[codes.int()] * largest.repeat_interleave(SCALE_BLOCK)[: len(codes)] + offset


def double_quantize(absmax: Tensor) -> BlockScales:
    """Quantize block scales to 8 bits around their mean, in blocks of `SCALE_BLOCK` (QLoRA, section 3).

    Args:
        absmax: float32 [N].
    """
    offset = absmax.mean()
    blocks = _pad_to_multiple(absmax - offset, SCALE_BLOCK).view(-1, SCALE_BLOCK)
    largest = largest_magnitude(blocks)
    unit = blocks / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    codes = _nearest(unit, dynamic_codebook(absmax.device)).flatten()[: absmax.numel()]
    return BlockScales(codes.to(torch.uint8), largest, offset)


def _nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest value of an ascending codebook, for each element: int32 in the shape of ``x``."""
    return torch.bucketize(x, (codebook[1:] + codebook[:-1]) / 2, out_int32=True)


@cache
@torch.inference_mode(False)
def dynamic_codebook(device: torch.device = _CPU) -> Tensor:
    """The signed 8-bit dynamic data type (Dettmers, 2016, "8-bit approximations").

    Each value is a power of ten times a fraction; the smaller the power, the fewer bits are left for the fraction.

    Returns:
        float32 [256] on ``device``, ascending; shared by all callers, as in `normal_float_codebook`.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device=_CPU)]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device=_CPU)
        magnitude = 10.0 ** (exponent - 6) * (edges[1:] + edges[:-1]) / 2
        values += [magnitude, -magnitude]
    return torch.cat(values).sort().values.to(device)
