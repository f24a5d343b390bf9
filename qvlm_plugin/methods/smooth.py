"""``transform=smooth``: move the magnitude of channels from the activations into the weights.

SmoothQuant (Xiao et al., 2023, Eq. 4): channel j of a site is divided by s_j = max|x_j|^α / max|w_j|^(1-α), and the
columns of its Linears are multiplied by it; the division is folded into the module that produces the activation.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.minmax import observe
from qvlm_plugin.methods.scaling import SMALLEST_MAGNITUDE, fold_of, over_readers
from qvlm_plugin.models.placement import materialized


@torch.no_grad()
def smooth(context: SearchContext, draft: Draft) -> Draft:
    """The scale of every site whose activations are rounded and whose producer can take it: ``<site>/scale``.

    Raises:
        QVLMError: an input is not finite.
    """
    sites = [site for site in context.activation_sites if site.producer]
    folds, tensors = [], {}
    statistics = observe(context, sites, draft)
    for site in sites:
        if (seen := statistics.get(site.name)) is None:  # of an expert that no calibration token reached
            continue
        fold = fold_of(site, context.model)
        inputs = torch.maximum(seen.upper, -seen.lower)
        columns = torch.stack([_largest_of_columns(context, name) for name in site.linears]).amax(dim=0)
        channels = len(context.model.get_submodule(site.producer).weight)
        largest = [over_readers(values.to(inputs.device), fold, channels, torch.amax) for values in (inputs, columns)]
        tensors[f"{site.name}/scale"] = smoothing_scale(*largest, context.options.smooth_alpha).cpu()
        folds.append(fold)
    return replace(draft.adding(tensors), folds=(*draft.folds, *folds))


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s = inputs^α / weights^(1-α) of largest magnitudes [C]; 1 where a channel or all of its weights are 0."""
    dead = (inputs <= SMALLEST_MAGNITUDE * inputs.max()) | (weights <= SMALLEST_MAGNITUDE * weights.max())
    scale = inputs.clamp_min(1e-30).pow(alpha) / weights.clamp_min(1e-30).pow(1 - alpha)
    return torch.where(dead, 1.0, scale)


def _largest_of_columns(context: SearchContext, name: str) -> Tensor:
    linear = context.model.get_submodule(name)
    with materialized(linear):
        return linear.weight.abs().amax(dim=0).float()
