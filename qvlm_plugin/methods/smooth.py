"""``transform=smooth``: move the magnitude of channels from the activations into the weights.

SmoothQuant (Xiao et al., 2023, Eq. 4): channel j of a site is divided by s_j = max|x_j|^α / max|w_j|^(1-α), and the
columns of its Linears are multiplied by it; the division is folded into the module that produces the activation.

``smooth_by=rms`` takes root mean squares instead of maxima. The rounding errors of a rotated token have the same size
in all directions, proportional to the token's norm. The squared output error is then about Σ (x_j/s_j)² · Σ (w_j s_j)²;
by the Cauchy-Schwarz inequality its minimum is (Σ |x_j| |w_j|)², at s_j = (rms x_j / rms w_j)^½. The same holds for
errors of the weight.

If inputs are rotated (``transform=smooth+rotate``), the division is merged into the signs of the rotation instead of
being folded. Sites after a GELU, through which no scale can be folded, are then smoothed as well, and each reader of a
shared head has its own scale.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.means import ordinary
from qvlm_plugin.methods.minmax import observe
from qvlm_plugin.methods.scaling import SMALLEST_MAGNITUDE, fold_of, over_readers
from qvlm_plugin.models.placement import materialized
from qvlm_plugin.observers import ChannelStatistics
from qvlm_plugin.topology import Site


@torch.no_grad()
def smooth(context: SearchContext, draft: Draft) -> Draft:
    """Add ``<site>/scale`` for every site whose activations are rounded and whose scale can be folded or rotated.

    Raises:
        QVLMError: an input is not finite.
    """
    by_rms, rotates = context.options.smooth_by == "rms", "rotate" in context.options.transforms
    sites = [site for site in context.activation_sites if rotates or site.producer]
    folds, tensors = [], {}
    statistics = observe(context, sites, draft, _with_squares if by_rms else None)
    for site in sites:
        if (seen := statistics.get(site.name)) is None:  # an expert that no calibration token reached
            continue
        if by_rms:
            both = _spread(context, site, seen), sum(_squares_of_columns(context, name) for name in site.linears)
        else:
            largest = torch.stack([_largest_of_columns(context, name) for name in site.linears]).amax(dim=0)
            both = torch.maximum(seen.upper, -seen.lower), largest
        if not rotates:
            folds.append(fold_of(site, context.model))
            channels = len(context.model.get_submodule(site.producer).weight)
            reduce = torch.mean if by_rms else torch.amax
            both = (over_readers(values, folds[-1], channels, reduce) for values in both)
        inputs, weights = ((values.sqrt() if by_rms else values).to(seen.total.device) for values in both)
        tensors[f"{site.name}/scale"] = smoothing_scale(inputs, weights, context.options.smooth_alpha).cpu()
    return replace(draft.adding(tensors), folds=(*draft.folds, *folds))


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s = inputs^α / weights^(1-α) of magnitudes [C]; 1 for channels whose inputs or weights are close to 0."""
    dead = (inputs <= SMALLEST_MAGNITUDE * inputs.max()) | (weights <= SMALLEST_MAGNITUDE * weights.max())
    scale = inputs.clamp_min(1e-30).pow(alpha) / weights.clamp_min(1e-30).pow(1 - alpha)
    return torch.where(dead, 1.0, scale)


def _with_squares(tokens: Tensor) -> Tensor:
    """`ordinary` tokens concatenated with their squares: [N, 2C]."""
    kept = ordinary(tokens)
    return torch.cat([kept, kept.square()], dim=1)


def _spread(context: SearchContext, site: Site, seen: ChannelStatistics) -> Tensor:
    """The mean square of each channel; its variance if tokens are centered before they are rounded."""
    mean, square = seen.mean.chunk(2)
    centered = context.options.center and context.activation_sites[site].kind == "dynamic_token"
    return (square - mean.square()).clamp_min(0) if centered else square


def _largest_of_columns(context: SearchContext, name: str) -> Tensor:
    linear = context.model.get_submodule(name)
    with materialized(linear):
        return linear.weight.abs().amax(dim=0).float()


def _squares_of_columns(context: SearchContext, name: str) -> Tensor:
    linear = context.model.get_submodule(name)
    with materialized(linear):
        return linear.weight.float().square().sum(dim=0)
