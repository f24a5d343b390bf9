"""``transform=awq``: activation-aware weight scaling and clipping (Lin et al., 2023).

Each site's scale and each weight group's clipping factor minimise the output error of their Linears on a sample of
calibration tokens.
"""

from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.methods.clipping import search_clip
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.replacements import copied
from qvlm_plugin.methods.sampling import Sample, sample_tokens
from qvlm_plugin.methods.scaling import (
    duo_scale_grid,
    fold_of,
    over_readers,
    produced_magnitude,
    scale_grid,
    search_scale,
    weight_shares,
)
from qvlm_plugin.plan import apply_fold
from qvlm_plugin.plan_header import Fold
from qvlm_plugin.progress import track
from qvlm_plugin.topology import Site

UNCLIPPED = ("q_proj", "k_proj", "query", "key", "qkv", "Wqkv", "query_key_value")
"""Ends of the names of Linears that are not clipped: queries and keys are multiplied by each other, so clipping errs
more than the error of their own outputs shows."""


def scale_and_clip(context: SearchContext, draft: Draft) -> Draft:
    """Add ``<site>/scale`` and ``<linear>/clip`` in all parts whose weights are quantized.

    Raises:
        QVLMError: an input is not finite.
    """
    sites, options = context.weight_sites, context.options
    tokens = sample_tokens(context, sites, options.search_tokens, draft.token_weights)
    sites = [site for site in sites if site.name in tokens]  # some experts may process no token
    blocks = [list(block) for _, block in groupby(sites, key=lambda site: (site.part, site.block))]
    found = []
    for block in track(context.shard.own(blocks), "scales and clips"):
        weight_format = options.weight_format(getattr(context.scheme, block[0].part).weight)
        found.append(search_block(context.model, block, weight_format, tokens, options))
    folds, tensors = draft.folds, {}
    for more_folds, more_tensors in context.shard.gathered(found):
        folds, tensors = (*folds, *more_folds), tensors | more_tensors
    return replace(draft.adding(tensors), folds=folds)


@torch.no_grad()
def search_block(
    model: nn.Module, sites: list[Site], weight_format: WeightFormat, tokens: dict[str, Sample], options: MethodOptions
) -> tuple[list[Fold], dict[str, Tensor]]:
    """Scales and clipping factors of one block's sites; see `scale_and_clip`.

    Scales are searched on the original weights: dividing a producer's rows also divides its rounding errors, so the
    order does not matter. Clipping factors are searched on a copy of the block with all scales folded.
    """
    names = {name for site in sites for name in (*site.linears, site.producer) if name}
    modules = {name: copied(model.get_submodule(name)) for name in names}
    folds, tensors = {}, {}
    for site in sites:
        if site.producer:
            fold = folds[site] = fold_of(site, model)
            weights = [modules[name].weight for name in site.linears]
            channels, device = len(modules[site.producer].weight), weights[0].device
            magnitude = produced_magnitude(tokens[site.name].tokens.to(device), fold, channels)
            grid = scale_grid(magnitude, options.alpha_steps)
            if options.duo_scaling:
                shares = over_readers(weight_shares(weights, weight_format), fold, channels, torch.mean)
                grid = duo_scale_grid(magnitude, shares, options.alpha_steps)
            scale = search_scale(weights, weight_format, tokens[site.name].weighted(device), fold, grid)
            tensors[f"{site.name}/scale"] = scale.cpu()
    for site, fold in folds.items():
        linears = [modules[name] for name in site.linears]
        apply_fold(fold, tensors[f"{site.name}/scale"], modules[site.producer], linears)
    for site in sites if options.weight_clip == "none" else ():  # ``mse`` replaces AWQ's own clipping
        clipped = [name for name in site.linears if not name.endswith(UNCLIPPED)]
        for name in clipped:
            weight = modules[name].weight
            inputs = tokens[site.name].weighted(weight.device)
            if site in folds:
                inputs = inputs / folds[site].spread(tensors[f"{site.name}/scale"], weight.shape[1]).to(weight.device)
            tensors[f"{name}/clip"] = search_clip(weight, weight_format, inputs, options.clips).cpu()
    return list(folds.values()), tensors
