"""``weight_clip=mse``: narrow the range of each group of weights to the least squared error of the weights."""

import torch

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.methods.clipping import search_clip
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.methods.replacements import quantized_module
from qvlm_plugin.models.placement import materialized
from qvlm_plugin.progress import track

_UNROUNDED = {"weight": WeightFormat(), "activation": ActivationFormat()}


@torch.no_grad()
def clip_weights(context: SearchContext, draft: Draft) -> Draft:
    """Add ``<linear>/clip`` for every Linear whose weight the scheme rounds, searched after folds and rotations."""
    plan, tensors, factors = build_plan(context, draft), {}, context.options.clips
    for module in track(plan.modules, "clipping weights"):
        if module.weight.kind != "none":
            with materialized(context.model.get_submodule(module.name)):
                own = quantized_module(plan, module.model_copy(update=_UNROUNDED), context.model, REFERENCE)
                tensors[f"{module.name}/clip"] = search_clip(own.weight, module.weight, None, factors).cpu()
    return draft.adding(tensors)
