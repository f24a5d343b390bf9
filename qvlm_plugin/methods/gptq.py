"""GPTQ (Frantar et al., 2023): round a weight column by column, and let the columns to come make up for each error.

With inputs x and H = Σ x xᵀ the squared error of a Linear's outputs is tr(E H Eᵀ) for errors E of its weight. Once a
column is rounded, the others that are least in error are found from the Cholesky factor of H⁻¹ (GPTQ, Eq. 2 and 3). The
points of the grid are fixed before (static groups), so that columns can be taken in any order.

Where the inputs are those of a quantized model, the Linear should give for its input x̂ what the full-precision model
gives for x: Ŵ x̂ ≈ W x. The real-valued weight of least error is W + W Σ(x - x̂) x̂ᵀ H⁻¹, which is rounded then
(``correction``; GPTAQ, Li et al., 2025, has this term inside the columns' updates).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qvlm_plugin.formats import NF_BLOCK, WeightFormat
from qvlm_plugin.methods.options import GPTQOptions
from qvlm_plugin.quantizers import IntWeight, NormalFloatWeight, double_quantize, nearest_codes, normal_float_codebook

BLOCK = 128
"""Columns after whose rounding all the later ones are updated at once."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a Linear's inputs over calibration tokens.

    Attributes:
        hessian: H = Σ x̂ x̂ᵀ of the inputs that the weight multiplies in the quantized model: float32 [K, K].
        shift: Σ (x - x̂) x̂ᵀ, with the inputs x of the full-precision model; None where it is not wanted.
    """

    hessian: Tensor
    shift: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, reference: Tensor | None = None, weights: Tensor | None = None) -> "Moments":
        """Those of tokens.

        Args:
            inputs: x̂ [N, K].
            reference: x [N, K].
            weights: factors of the tokens' squared errors [N]; None takes all as 1.
        """
        inputs = inputs.float()
        weighted = inputs if weights is None else inputs * weights.to(inputs.device).unsqueeze(1)
        shift = None if reference is None else (reference.float() - inputs).T @ weighted
        return cls(weighted.T @ inputs, shift)

    def __add__(self, other: "Moments") -> "Moments":
        """Those of both sets of tokens together."""
        shift = None if self.shift is None else self.shift + other.shift
        return Moments(self.hessian + other.hessian, shift)

    def to(self, device: torch.device | str, **how: object) -> "Moments":
        """The same on a device."""
        shift = None if self.shift is None else self.shift.to(device, **how)
        return Moments(self.hessian.to(device, **how), shift)


@dataclass(frozen=True, eq=False)
class Factors:
    """What rounding takes of `Moments`: the same for all Linears of a site.

    Attributes:
        hessian: H with ``damping`` times its mean diagonal added to the diagonal; float64, positive definite.
        order: of the columns.
        factor: the upper Cholesky factor of H⁻¹ in that order: float32.
        shift: of the moments.
    """

    hessian: Tensor
    order: Tensor
    factor: Tensor
    shift: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, moments: Moments, options: GPTQOptions) -> "Factors":
        """Those of moments, with the damping and the order of the options."""
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
    """The codes of a weight. Of each output channel, they are never worse than the nearest on the damped H.

    Args:
        weight: [O, K], any floating-point dtype.
        weight_format: of the codes; ``int`` or ``nf``.
        factors: of the inputs, on the weight's device.
        correction: share of what the layers below have lost that the weight makes up for; it takes a ``shift``.
        clip: factors that narrow the groups' ranges, as for `nearest_codes`.

    Returns:
        Codes; block scales of ``nf`` are those before double quantization, and codes are for those after it.
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
    """The points that each element of a weight [O, K] may be rounded to.

    Attributes:
        table: float32 [M], what codes stand for before they are scaled.
        edges: float32 [M - 1], half-way between them.
        scale: float32 [O, K].
        zero_point: float32 [O, K], taken from the table's values; None for 0.
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
        """Those of the transposed weight, its rows in this order."""
        both = self.scale, self.zero_point
        scale, zero_point = (values if values is None else values.T[order].contiguous() for values in both)
        return replace(self, scale=scale, zero_point=zero_point)

    def nearest(self, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Codes of a row's values, and what they stand for."""
        scale = self.scale[index]
        units = values / torch.where(scale > 0, scale, 1.0)
        if self.zero_point is None:
            codes = torch.bucketize(units, self.edges)
            return codes.to(torch.uint8), self.table[codes] * scale
        zero = self.zero_point[index]
        codes = units.add_(zero).round_().clamp_(0, len(self.table) - 1)
        return codes.to(torch.uint8), (codes - zero) * scale

    def values(self, codes: Tensor) -> Tensor:
        """What codes [O, K] stand for."""
        found = self.table[codes.int()]
        return (found if self.zero_point is None else found - self.zero_point) * self.scale


def _round_columns(weight: Tensor, factors: Factors, points: _Points) -> Tensor:
    """Codes [O, K] of a weight, found column by column."""
    columns, order, factor = weight.shape[1], factors.order, factors.factor
    # Transposed, so that what belongs to a column lies together.
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
