"""The equivalent transformation of AWQ (Lin et al., 2023, "Activation-aware Weight Quantization", section 3.2).

Weights that multiply large activations matter more. Multiplying such a weight column by s > 1 before rounding, and
dividing the activation by s, leaves the product unchanged but reduces the column's relative rounding error. The scale
is s = mean|x|^alpha for each channel, with the alpha of least output error; the division is folded into the module that
produces the activation.

With duo scaling, s = mean|x|^alpha / mean|w|^(1 - alpha), where each weight is divided by the largest magnitude of its
group first. So channels whose weights are small in their groups, which lose most in rounding, are scaled up as well.
The paper does not have it; it comes from AutoAWQ (``duo_scaling`` there and in llm-compressor's AWQModifier).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.reference import round_weight
from qvlm_plugin.methods.clipping import join_groups, split_groups
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
    """Apply ``reduce`` (such as `torch.mean`) to the values of the input channels that read the same output channel.

    Args:
        values: one value for each of a site's input channels, [C].
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


def duo_scale_grid(magnitude: Tensor, shares: Tensor, steps: int) -> list[Tensor]:
    """All ones, and the scales magnitude^alpha / shares^(1 - alpha) of ``steps - 1`` values of alpha from 0 to 1.

    Args:
        magnitude: mean|x| of each channel, float32 [C].
        shares: `weight_shares` of each channel, float32 [C].
        steps: the number of scales.

    Returns:
        float32 [C] each, positive, divided by the geometric mean of its extremes.
    """
    alphas = [step / max(steps - 2, 1) for step in range(steps - 1)]
    products = (channel_scale(magnitude, alpha) / channel_scale(shares, 1 - alpha) for alpha in alphas)
    return [torch.ones_like(magnitude), *(scale / (scale.max() * scale.min()).sqrt() for scale in products)]


def weight_shares(weights: Sequence[Tensor], weight_format: WeightFormat) -> Tensor:
    """Mean magnitude of each input channel's weights, as shares of the largest magnitude in their group.

    Args:
        weights: weights of a site's Linears, [O, I] each.
        weight_format: decides the groups.

    Returns:
        float32 [I]: the mean over all output channels.
    """
    shares = []
    for weight in weights:
        groups = split_groups(weight.float().abs(), weight_format)
        relative = groups / groups.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        shares.append(join_groups(relative, weight.shape, weight_format))
    return torch.cat(shares).mean(dim=0)


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
        weights: weights of the site's Linears, [O, I] each.
        weight_format: the format that they are rounded to.
        tokens: the Linears' input, [N, I] float32.
        fold: the fold of the scale.
        candidates: scales, float32 [output channels of the producer].
    """

    def error(scale: Tensor) -> Tensor:
        columns = fold.spread(scale, tokens.shape[1])
        # The rounded scaled weight on x / s equals this rescaled weight on x.
        rounded = (round_weight(weight.float() * columns, weight_format) / columns for weight in weights)
        return sum(output_error(*pair, tokens) for pair in zip(weights, rounded, strict=True))

    return candidates[int(torch.stack([error(scale) for scale in candidates]).argmin())]
