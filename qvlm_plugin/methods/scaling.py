"""The equivalent transformation of AWQ (Lin et al., 2023, "Activation-aware Weight Quantization", section 3.2).

Weights that multiply large activations matter more. Multiplying such a weight column by s > 1 before rounding, and
dividing the activation by s, leaves the product as it is but makes that column's relative rounding error smaller. The
scale is s = mean|x|^alpha for each channel, with the alpha that errs least; the division is folded into the module that
produces the activation.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.reference import round_weight
from qvlm_plugin.plan_header import Fold
from qvlm_plugin.topology import Site

SMALLEST_MAGNITUDE = 1e-4
"""Magnitudes below this share of the largest one are raised to it, so that dead channels get a finite scale."""


def fold_of(site: Site, model: nn.Module) -> Fold:
    """Where the scale of a site with a producer is folded, from the widths of the modules."""
    produced = len(model.get_submodule(site.producer).weight)
    if produced == model.get_submodule(site.name).in_features:
        return Fold(site=site.name, producer=site.producer)
    attention = model.get_submodule(site.producer.rpartition(".")[0])
    return Fold(site=site.name, producer=site.producer, head_dim=attention.head_dim)


def produced_magnitude(tokens: Tensor, fold: Fold, channels: int) -> Tensor:
    """mean|x| of each channel that the producer writes: over the tokens, and over the readers of a shared head.

    Args:
        tokens: what the site reads, [N, C].
        fold: see `Fold.head_dim`.
        channels: what the producer writes; fewer than C when heads are shared.

    Returns:
        float32 [channels].
    """
    return over_readers(tokens.float().abs().mean(dim=0), fold, channels, torch.mean)


def over_readers(values: Tensor, fold: Fold, channels: int, reduce: Callable[..., Tensor]) -> Tensor:
    """What ``reduce`` (as `torch.mean`) makes, for each of the producer's channels, of what it is read as.

    Args:
        values: of what a site reads, [C].
        fold: see `Fold.head_dim`.
        channels: what the producer writes; fewer than C when heads are shared.

    Returns:
        [channels].
    """
    if fold.head_dim is None:
        return values
    return reduce(values.view(channels // fold.head_dim, -1, fold.head_dim), dim=1).flatten()


def channel_scale(magnitude: Tensor, alpha: float) -> Tensor:
    """magnitude^alpha, divided by the geometric mean of its extremes: float32 [C], positive; all ones for alpha 0."""
    scale = magnitude.clamp_min(SMALLEST_MAGNITUDE * magnitude.max()).pow(alpha)
    if not magnitude.any():
        return torch.ones_like(scale)
    return scale / (scale.max() * scale.min()).sqrt()


def scale_grid(magnitude: Tensor, steps: int) -> list[Tensor]:
    """The scales of alpha = 0, 1/steps, … up to but without 1; see `channel_scale`."""
    return [channel_scale(magnitude, step / steps) for step in range(steps)]


def output_error(weight: Tensor, approximation: Tensor, tokens: Tensor) -> Tensor:
    """Squared distance of a Linear's outputs from what they were, summed over tokens: a float32 scalar.

    Args:
        weight, approximation: [O, I].
        tokens: [N, I] float32.
    """
    return (tokens @ (weight.float() - approximation.float()).T).square().sum()


def search_scale(
    weights: Sequence[Tensor], weight_format: WeightFormat, tokens: Tensor, fold: Fold, candidates: Sequence[Tensor]
) -> Tensor:
    """The candidate that errs least over all Linears of a site; ties keep the earlier one.

    Args:
        weights: of the site's Linears, [O, I] each.
        weight_format: they are rounded to.
        tokens: what they read, [N, I] float32.
        fold: where the scale goes.
        candidates: scales, float32 [channels that the producer writes].
    """

    def error(scale: Tensor) -> Tensor:
        columns = fold.spread(scale, tokens.shape[1])
        # What the rounded, scaled weight does to x / s, the unscaled equivalent does to x.
        rounded = (round_weight(weight.float() * columns, weight_format) / columns for weight in weights)
        return sum(output_error(*pair, tokens) for pair in zip(weights, rounded, strict=True))

    return candidates[int(torch.stack([error(scale) for scale in candidates]).argmin())]
