"""GPTQ (Frantar et al., 2023): round a weight column by column; the remaining columns compensate each error.

With inputs x and H = Σ x xᵀ the squared error of a Linear's outputs is tr(E H Eᵀ) for errors E of its weight. Once a
column is rounded, the optimal update of the others follows from the Cholesky factor of H⁻¹ (GPTQ, Eq. 2 and 3). Scales
and zero points are fixed beforehand (static groups), so that columns can be rounded in any order.

In a quantized model, the Linear's output for the quantized model's input x̂ should equal the full-precision output for
x: Ŵ x̂ ≈ W x. The real-valued weight with the least error is W + W Σ(x - x̂) x̂ᵀ H⁻¹, and this weight is rounded
(``correction``; in GPTAQ, Li et al., 2025, the term is part of the column updates).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qvlm_plugin.formats import NF_BLOCK, WeightFormat
from qvlm_plugin.methods.options import GPTQOptions
from qvlm_plugin.quantizers import IntWeight, NormalFloatWeight, double_quantize, nearest_codes, normal_float_codebook

BLOCK = 128
"""Columns rounded before all later ones are updated by one matrix product."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a Linear's inputs over calibration tokens.

    Attributes:
        hessian: H = Σ x̂ x̂ᵀ of the inputs that the weight multiplies in the quantized model: float32 [K, K].
        shift: Σ (x - x̂) x̂ᵀ: float32 [K, K], with the inputs x of the full-precision model; None without
            ``correction``.
    """

    hessian: Tensor
    shift: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, reference: Tensor | None = None, weights: Tensor | None = None) -> "Moments":
        """The moments of tokens.

        Args:
            inputs: x̂ [N, K].
            reference: x [N, K].
            weights: factors of the tokens' squared errors [N]; None: all 1.
        """
        inputs = inputs.float()
        weighted = inputs if weights is None else inputs * weights.to(inputs.device).unsqueeze(1)
        shift = None if reference is None else (reference.float() - inputs).T @ weighted
        return cls(weighted.T @ inputs, shift)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of tokens together."""
        shift = None if self.shift is None else self.shift + other.shift
        return Moments(self.hessian + other.hessian, shift)

    def to(self, device: torch.device | str, **options: object) -> "Moments":
        """The moments on a device; ``options`` are those of `Tensor.to`."""
        shift = None if self.shift is None else self.shift.to(device, **options)
        return Moments(self.hessian.to(device, **options), shift)


@dataclass(frozen=True, eq=False)
class Factors:
    """The matrices for rounding, computed from `Moments` once for all Linears of a site.

    Attributes:
        hessian: H with ``damping`` times its mean diagonal added to the diagonal: float64 [K, K], positive definite.
        order: order in which columns are rounded, int64 [K].
        factor: the upper Cholesky factor of H⁻¹ in that order: float32 [K, K].
        shift: `Moments.shift`.
    """

    hessian: Tensor
    order: Tensor
    factor: Tensor
    shift: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, moments: Moments, options: GPTQOptions) -> "Factors":
        """The factors of moments, with the damping and the column order of the options."""
        hessian = moments.hessian.double()
        mean = hessian.diagonal().mean()
        hessian.diagonal().add_(options.damping * mean if mean > 0 else 1.0)
        order = torch.arange(len(hessian), device=hessian.device)
        if options.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
        factor = torch.linalg.cholesky(inverse, upper=True).float()
        return cls(hessian, order, factor, moments.shift)


@torch.no_grad()
def gptq(
    weight: Tensor, weight_format: WeightFormat, factors: Factors, correction: float = 0.0, clip: Tensor | None = None
) -> IntWeight | NormalFloatWeight:
    """The codes of a weight; an output channel gets its nearest codes if these have less error under the damped H.

    Args:
        weight: [O, K], any floating-point dtype.
        weight_format: format of the codes; ``int`` or ``nf``.
        factors: factors of the inputs' moments, on the weight's device.
        correction: share of the earlier layers' error that the weight compensates; needs a ``shift``.
        clip: factors that narrow the groups' ranges, as for `nearest_codes`.

    Returns:
        The codes. Block scales of ``nf`` are those before double quantization; codes are computed for those after it.
    """
    hessian, wanted = factors.hessian, weight.float()
    if factors.shift is not None:
        moved = torch.linalg.solve(hessian, (wanted @ factors.shift).double().T).T.float()
        wanted = wanted + correction * moved
    nearest = nearest_codes(wanted.to(weight.dtype), weight_format, clip if clip is None else clip.to(weight.device))
    points = _Points.of(nearest, weight_format)
    codes = _round_columns(wanted, factors, points)
    errors = [_output_errors(points.values(found) - wanted, hessian) for found in (codes, nearest.codes)]
    codes = torch.where((errors[0] <= errors[1]).unsqueeze(1), codes, nearest.codes)
    return replace(nearest, codes=codes)


@dataclass(frozen=True, eq=False)
class _Points:
    """The rounding points of each element of a weight [O, K].

    Attributes:
        table: float32 [M], the unscaled value of each code.
        edges: float32 [M - 1], midpoints between neighbouring values.
        scale: float32 [O, K].
        zero_point: float32 [O, K], subtracted from the table's values; None for 0.
    """

    table: Tensor
    edges: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def of(cls, quantized: IntWeight | NormalFloatWeight, weight_format: WeightFormat) -> "_Points":
        rows, columns = quantized.codes.shape
        if isinstance(quantized, NormalFloatWeight):
            absmax = quantized.absmax
            if weight_format.double_quantization:
                absmax = double_quantize(absmax).dequantize()
            scale = absmax.repeat_interleave(NF_BLOCK)[: rows * columns].view(rows, columns)
            table = normal_float_codebook(weight_format.bits, scale.device)
            return cls(table, (table[1:] + table[:-1]) / 2, scale, None)
        size = quantized.group_size
        scale, zero = (
            groups.float().repeat_interleave(size, dim=1)[:, :columns]
            for groups in (quantized.scale, quantized.zero_point)
        )
        table = torch.arange(2**weight_format.bits, dtype=torch.float32, device=scale.device)
        return cls(table, (table[1:] + table[:-1]) / 2, scale, zero)

    def by_columns(self, order: Tensor) -> "_Points":
        """The points of the transposed weight, with its rows in this order."""
        both = self.scale, self.zero_point
        scale, zero_point = (values if values is None else values.T[order].contiguous() for values in both)
        return replace(self, scale=scale, zero_point=zero_point)

    def nearest(self, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The nearest codes to a row's values, and the values of these codes."""
        scale = self.scale[index]
        units = values / torch.where(scale > 0, scale, 1.0)
        if self.zero_point is None:
            codes = torch.bucketize(units, self.edges)
            return codes.to(torch.uint8), self.table[codes] * scale
        zero = self.zero_point[index]
        codes = units.add_(zero).round_().clamp_(0, len(self.table) - 1)
        return codes.to(torch.uint8), (codes - zero) * scale

    def values(self, codes: Tensor) -> Tensor:
        """The dequantized values of codes [O, K]."""
        found = self.table[codes.int()]
        return (found if self.zero_point is None else found - self.zero_point) * self.scale


def _round_columns(weight: Tensor, factors: Factors, points: _Points) -> Tensor:
    """Codes [O, K] of a weight, rounded column by column."""
    columns, order, factor = weight.shape[1], factors.order, factors.factor
    # Transposed, so that each column is contiguous in memory.
    rest, points = weight.T[order].contiguous(), points.by_columns(order)
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(rest[start:stop])
        for index in range(start, stop):
            codes[index], values = points.nearest(rest[index], index)
            error = errors[index - start] = (rest[index] - values) / factor[index, index]
            rest[index + 1 : stop].addr_(factor[index, index + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.contiguous()


def _output_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each output channel: [O]."""
    return ((error @ hessian.float()) * error).sum(dim=1)
