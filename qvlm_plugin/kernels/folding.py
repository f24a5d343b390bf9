"""Static per-channel activations as integer codes: the channels' steps move into the weight.

A channel's step lies along the axis that a product sums over, so it cannot be taken out of an integer product. With
``x̂ = offset + step · code`` for each channel it can be folded: ``W x̂ = (W · diag(step)) code + W offset``. The folded
weight is quantized again. Channels are sorted by their step, so that channels that share a weight scale have similar
steps. ``W offset`` is added to the bias without rounding, so constant channels are exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm_plugin.kernels import fusable, fused
from qvlm_plugin.quantizers import by_rows, quantization_step, round_to_codes

LARGEST_SUM = 2.0**14
"""Bound on the magnitude of a folded product: its sums and scales then fit float16 (up to 65,504) as well."""


@dataclass(frozen=True, eq=False)
class Folded:
    """A weight with its input's steps folded in; channels are in the order of ``index``, their steps ascending.

    Attributes:
        weight: float32 [O, I], the folded weight divided by ``multiplier``.
        step: float32 [I].
        multiplier: float32 [], a power of two, by which products with ``weight`` must be multiplied.
        codes: tensors that turn an input into codes, see `with_encoding`: ``index`` int32 [I], ``lower``, ``inverse``,
            ``low`` float32 [I].
        constant: float32 [O], added to the product: the bias and ``W offset``.
        remainder: float32 [I], the code of a channel's centre before it is rounded to the grid.
    """

    weight: Tensor
    step: Tensor
    multiplier: Tensor
    codes: dict[str, Tensor]
    constant: Tensor
    remainder: Tensor

    def bias(self, rounded: Tensor) -> Tensor:
        """The bias of a product with ``rounded`` [O, I], the rounded ``weight``: float32 [O].

        With it, rounding does not change the output for an input at the channels' centres; if these are the means, it
        does not change the mean output.
        """
        return self.constant + self.multiplier * ((self.weight - rounded) @ self.remainder)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    largest_code: int,
    mean: Tensor | None = None,
) -> Folded:
    """Fold the steps of a static per-channel quantizer into a weight.

    Code 0 is the point of a channel's grid nearest to its centre: its mean, or 0 if the mean is unknown. Codes of
    typical inputs are then small, and their sums do not cancel against the constant.

    Args:
        weight: [O, I].
        bias: [O] or None.
        lower, upper: bounds [I].
        bits: 2 to 8.
        largest_code: codes from ``-largest_code`` to ``largest_code - 1`` can be represented.
        mean: mean of each channel's inputs, [I]; None if unknown.
    """
    weight, lower, upper = weight.float(), lower.float(), upper.float()
    levels = 2**bits - 1
    step, inverse = quantization_step(lower, upper, bits)
    step = step.clamp_min(0)
    centre = (torch.zeros_like(lower) if mean is None else mean.float()).clamp(lower, upper)
    lowest, highest = max(0, levels - largest_code + 1), min(levels, largest_code)
    zero_point = ((centre - lower) * inverse).round().clamp(lowest, highest)
    offset = lower + zero_point * step
    remainder = (centre - offset) * inverse

    index = step.argsort(stable=True)
    constant = weight @ offset if bias is None else torch.addmv(bias.float(), weight, offset)
    folded = weight[:, index].mul_(step[index])
    multiplier = _normalizer(torch.linalg.vector_norm(folded, ord=1, dim=1).max() * levels)
    codes = {"index": index.int(), "lower": lower[index], "inverse": inverse[index], "low": -zero_point[index]}
    return Folded(folded.div_(multiplier), step[index], multiplier, codes, constant, remainder[index])


def with_encoding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, with those of `Folded.codes`, if present, laid out for `encode`: bounds in the input's order."""
    if "index" not in tensors:
        return dict(tensors)
    index = tensors["index"].long()
    order = index.argsort()
    bounds = {name: tensors[name][order] for name in ("lower", "inverse", "low")}
    return {**tensors, **bounds, "index": index}


ENCODING = ("lower", "inverse", "low", "index")
"""Names of the tensors that `encode` reads."""


def encode(x: Tensor, tensors: Mapping[str, Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    """The codes of ``x`` [..., I] at ``index`` [C], whole numbers in ``dtype`` [N, C]."""
    bounds, index = (tensors["lower"], tensors["inverse"], tensors["low"]), tensors["index"]
    if fusable.channels(x):
        return fused.codes_of_channels(x, bounds, index, bits, dtype)

    def codes(x: Tensor, lower: Tensor, inverse: Tensor, low: Tensor) -> Tensor:
        return round_to_codes(x, lower, inverse, bits).add_(low)

    tokens = x.reshape(-1, x.shape[-1])
    unordered = by_rows(codes, tokens, bounds, dtype)
    # Codes are ordered instead of inputs, because they are smaller; gather is several times as fast as index_select.
    return unordered.gather(1, index.expand(len(tokens), -1))


def unfold(weight: Tensor, tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The reference kernel's tensors that compute the same as a folded weight.

    Args:
        weight: float32 [O, I], folded and rounded, times its multiplier.
        tensors: ``bias`` [O] and `Folded.codes`.
        bits: bits of the codes.

    Returns:
        ``weight`` [O, I] and ``bias`` [O], ``lower`` and ``upper`` [I]; channels in the input's order.
    """
    lower, inverse = tensors["lower"], tensors["inverse"]
    step = torch.where(inverse > 0, 1 / inverse, 0)
    original = weight * inverse  # constant channels are in the bias; their columns are 0
    bias = tensors["bias"] + weight @ tensors["low"] - original @ lower
    order = tensors["index"].argsort()
    upper = lower + step * (2**bits - 1)
    return {"weight": original[:, order], "bias": bias, "lower": lower[order], "upper": upper[order]}


def _normalizer(largest_sum: Tensor) -> Tensor:
    """The power of two that brings the largest sum to at most `LARGEST_SUM`, and above half of it."""
    exponent = torch.where(largest_sum > 0, largest_sum, LARGEST_SUM).div(LARGEST_SUM).log2().ceil()
    return exponent.exp2()
