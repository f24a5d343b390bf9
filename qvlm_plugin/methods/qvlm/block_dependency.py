"""D(k, k+1) of a part's blocks on calibration data (paper, Eq. 4), also as measured for the threshold.

In the paper, x^(k) is the tensor that a quantizer rounds. ``dependency=site`` takes the codes of each layer's first
site, with its own bounds; ``dependency=output`` the codes that the layer's output would have with each channel's
extremes as bounds, although no quantizer rounds it.

Dependencies are measured on top of the optimized vision tower: visual encoder optimization is meant to lower them
(Eq. 8), which would make blocks smaller. The threshold is their mean before the optimization.
"""

import torch
from torch import Tensor

from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, build_plan, centered, rotated, transformed
from qvlm_plugin.methods.hidden import HiddenCache, quantized_inputs
from qvlm_plugin.methods.qvlm.dependency import Assignment, Ranged, layer_dependency
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.quantizers import token_range
from qvlm_plugin.topology import Site

BEFORE = "dependencies_before"
"""Key of the plan's record for the dependencies before visual encoder optimization."""


@torch.no_grad()
def dependencies(context: SearchContext, plan: RoundingPlan, hidden: HiddenCache) -> list[float]:
    """D(k, k+1) of consecutive blocks of a part, run in full precision.

    Args:
        context: the search.
        plan: the plan, with the bounds of every site.
        hidden: the first block's input.
    """
    assignment = Assignment.of(context.options, getattr(context.scheme, hidden.part).activation)
    values, previous = [], None
    sites = first_sites(context, hidden.part)
    for index, named in enumerate(context.blocks(hidden.part)):
        if context.options.dependency == "site":
            batches = [batch[sites[index]] for batch in hidden.inputs(*named, [sites[index]])]
            seen = rounded_input(context, plan, sites[index], torch.cat(context.shard.gathered(batches)))
            hidden = hidden.through(*named)
        else:
            hidden = hidden.through(*named)
            seen = Ranged.by_extremes(hidden.tokens())
        if previous is not None:
            values.append(layer_dependency(previous, seen.to(previous.states.device), assignment))
        previous = seen
    return values


def first_sites(context: SearchContext, part: str = "decoder") -> list[Site]:
    """The first site of each block of a part, which reads the block's input; dependency is measured there."""
    found: dict[int, Site] = {}
    for site in context.activation_sites:
        if site.part == part:
            found.setdefault(site.block, site)
    return [found[index] for index in range(len(context.blocks(part)))]


def rounded_input(context: SearchContext, plan: Draft | RoundingPlan, site: Site, x: Tensor) -> Ranged:
    """The tensor that a site rounds when the model's current state gives it ``x`` [..., C], with the plan's bounds."""
    linear = context.model.get_submodule(site.name)
    # In a quantized model, folds have already scaled the input.
    tokens = rotated(plan, site, x) if isinstance(linear, QuantLinear) else transformed(plan, site, x)
    tokens = centered(plan, site, tokens.reshape(-1, x.shape[-1]))
    fmt = context.activation_sites[site]
    values = [plan.tensors[f"{site.name}/{name}"].to(tokens.device) for name in fmt.parameters]
    return Ranged(tokens, *(values if fmt.kind == "static_channel" else token_range(tokens, *values, fmt.reach)))


def observe_before(context: SearchContext, draft: Draft) -> Draft:
    """Record the dependencies before visual encoder optimization, for the threshold."""
    plan = build_plan(context, draft)
    return draft.adding(record={BEFORE: dependencies(context, plan, quantized_inputs(context, plan))})
