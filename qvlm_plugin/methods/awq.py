"""``awq``: activation-aware scaling and clipping of the weights (Lin et al., 2023), and searched activation ranges.

Each site's scale and each weight group's clipping factor minimise the output error of their Linears on a sample of
calibration tokens. The activation ranges are searched as for ``qlora``, on the inputs as the scales leave them.
"""

import copy
from itertools import groupby

import torch
from torch import Tensor, nn

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.methods.build import activation_sites, build_plan, weight_sites
from qvlm_plugin.methods.clipping import search_clip
from qvlm_plugin.methods.options import AWQOptions
from qvlm_plugin.methods.qlora import observe_means, search_ranges
from qvlm_plugin.methods.sampling import sample_tokens
from qvlm_plugin.methods.scaling import fold_of, search_scale
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import materialized
from qvlm_plugin.plan import RoundingPlan, apply_fold
from qvlm_plugin.plan_header import Fold
from qvlm_plugin.progress import track
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import Site, Topology
from qvlm_plugin.workspace import Workspace

UNCLIPPED = ("q_proj", "k_proj")
"""Queries and keys are multiplied with each other, so that clipping them errs more than their own outputs show."""


def search_weights(
    loaded: LoadedModel, topology: Topology, scheme: Scheme, calibration: CalibrationSet, options: AWQOptions
) -> tuple[list[Fold], dict[str, Tensor]]:
    """Scales and clipping factors of all parts whose weights are quantized.

    Returns:
        The folds in the order to apply them, and the plan's tensors: ``<site>/scale`` and ``<linear>/clip``.

    Raises:
        QVLMError: an input is not finite.
    """
    model = loaded.model
    sites = weight_sites(topology, loaded, scheme)
    folds: list[Fold] = []
    tensors: dict[str, Tensor] = {}
    if sites:
        tokens = sample_tokens(loaded, sites, calibration, options.calibration_batch_size, options.search_tokens)
        sites = [site for site in sites if site.name in tokens]  # some experts may have seen none
        blocks = [list(block) for _, block in groupby(sites, key=lambda site: (site.part, site.block))]
        for block in track(blocks, "scales and clips"):
            weight_format = options.weight_format(getattr(scheme, block[0].part).weight)
            found = search_block(model, block, weight_format, tokens, options)
            folds += found[0]
            tensors |= found[1]
    return folds, tensors


@torch.no_grad()
def search_block(
    model: nn.Module, sites: list[Site], weight_format: WeightFormat, tokens: dict[str, Tensor], options: AWQOptions
) -> tuple[list[Fold], dict[str, Tensor]]:
    """Scales and clipping factors of one block's sites; see `search_weights`.

    Scales are searched on the original weights: dividing a producer's rows scales its rounding errors along, so the
    order does not matter. Clipping factors are searched on a copy of the block with all scales folded.
    """
    names = {name for site in sites for name in (*site.linears, site.producer) if name}
    modules = {name: _copy(model.get_submodule(name)) for name in names}
    folds, tensors = {}, {}
    for site in sites:
        if site.producer:
            fold = folds[site] = fold_of(site, model)
            weights = [modules[name].weight for name in site.linears]
            inputs = tokens[site.name].to(weights[0].device, torch.float32)
            channels = len(modules[site.producer].weight)
            scale = search_scale(weights, weight_format, inputs, fold, channels, options.alpha_steps)
            tensors[f"{site.name}/scale"] = scale.cpu()
    for site, fold in folds.items():
        linears = [modules[name] for name in site.linears]
        apply_fold(fold, tensors[f"{site.name}/scale"], modules[site.producer], linears)
    for site in sites:
        clipped = [name for name in site.linears if not name.endswith(UNCLIPPED)]
        for name in clipped:
            weight = modules[name].weight
            inputs = tokens[site.name].to(weight.device, torch.float32)
            if site in folds:
                inputs = inputs / folds[site].spread(tensors[f"{site.name}/scale"], weight.shape[1]).to(weight.device)
            tensors[f"{name}/clip"] = search_clip(weight, weight_format, inputs, options.clips).cpu()
    return list(folds.values()), tensors


def _copy(module: nn.Module) -> nn.Module:
    """A Linear or norm to change, with weights of its own on the device where ``module`` runs."""
    # Copied whole it would take accelerate's hook along, which refers to the offloaded weights of the whole model.
    twin = copy.copy(module)
    with materialized(module):
        twin._parameters = copy.deepcopy(module._parameters)
    return twin


def fit(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: AWQOptions,
    workspace: Workspace,
) -> RoundingPlan:
    """Search scales and clips of the weights, then the ranges of the scaled activations."""
    folds, tensors = search_weights(loaded, topology, scheme, calibration, options)
    scales = input_scales(loaded, folds, tensors)
    if formats := activation_sites(topology, loaded, scheme):
        tensors |= search_ranges(loaded, formats, calibration, options, scales)
    tensors |= observe_means(loaded, topology, scheme, calibration, options, scales)
    return build_plan("awq", loaded, topology, scheme, options, tensors, calibration, folds)


def input_scales(loaded: LoadedModel, folds: list[Fold], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By what folding divides the input of each folded site: [in_features] for its name."""
    widths = {fold.site: loaded.model.get_submodule(fold.site).in_features for fold in folds}
    return {fold.site: fold.spread(tensors[f"{fold.site}/scale"], widths[fold.site]) for fold in folds}
