"""The equivalent transformation of AWQ (Lin et al., 2023, "Activation-aware Weight Quantization", section 3.2).

Weights that multiply large activations matter more. Multiplying such a weight column by s > 1 before rounding, and
dividing the activation by s, leaves the product unchanged but reduces the column's relative rounding error. The scale
is s = mean|x|^alpha for each channel, with the alpha of least output error; the division is folded into the module that
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
    """The fold of a site with a producer, from the widths of the modules."""
    produced = len(model.get_submodule(site.producer).weight)
    if produced == model.get_submodule(site.name).in_features:
        return Fold(site=site.name, producer=site.producer)
    attention = model.get_submodule(site.producer.rpartition(".")[0])
    return Fold(site=site.name, producer=site.producer, head_dim=attention.head_dim)


def produced_magnitude(tokens: Tensor, fold: Fold, channels: int) -> Tensor:
    """mean|x| of each output channel of the producer: over tokens, and over the readers of a shared head.

    Args:
        tokens: input of the site, [N, C].
        fold: see `Fold.head_dim`.
        channels: output channels of the producer; fewer than C where heads are shared.

    Returns:
        float32 [channels].
    """
    return over_readers(tokens.float().abs().mean(dim=0), fold, channels, torch.mean)


def over_readers(values: Tensor, fold: Fold, channels: int, reduce: Callable[..., Tensor]) -> Tensor:
    """``reduce`` (for example `torch.mean`) the values of all input channels that read the same producer's channel.

    Args:
        values: of a site's input channels, [C].
        fold: see `Fold.head_dim`.
        channels: output channels of the producer; fewer than C where heads are shared.

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
    """The scales of alpha = 0, 1/steps, …, (steps - 1)/steps; see `channel_scale`."""
    return [channel_scale(magnitude, step / steps) for step in range(steps)]


def output_error(weight: Tensor, approximation: Tensor, tokens: Tensor) -> Tensor:
    """Squared error of a Linear's outputs with an approximated weight, summed over tokens: a float32 scalar.

    Args:
        weight, approximation: [O, I].
        tokens: [N, I] float32.
    """
    return (tokens @ (weight.float() - approximation.float()).T).square().sum()


def search_scale(
    weights: Sequence[Tensor], weight_format: WeightFormat, tokens: Tensor, fold: Fold, candidates: Sequence[Tensor]
) -> Tensor:
    """The candidate with the least error over all Linears of a site; the first of equal ones.

    Args:
        weights: of the site's Linears, [O, I] each.
        weight_format: the format that they are rounded to.
        tokens: their input, [N, I] float32.
        fold: of the scale.
        candidates: scales, float32 [output channels of the producer].
    """

    def error(scale: Tensor) -> Tensor:
        columns = fold.spread(scale, tokens.shape[1])
        # The rounded scaled weight on x / s equals this rescaled weight on x.
        rounded = (round_weight(weight.float() * columns, weight_format) / columns for weight in weights)
        return sum(output_error(*pair, tokens) for pair in zip(weights, rounded, strict=True))

    return candidates[int(torch.stack([error(scale) for scale in candidates]).argmin())]
