"""Min/max ranges: the extremes observed in calibration, without clipping."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.observe import visit_site_inputs
from qvlm_plugin.observers import ChannelStatistics
from qvlm_plugin.topology import Site


def observe_extremes(context: SearchContext, draft: Draft) -> Draft:
    """Add the observed extremes as bounds of every static site, and a clip ratio of 1 for every dynamic site."""
    formats = context.activation_sites
    statistics = observe(context, [site for site, fmt in formats.items() if fmt.kind == "static_channel"], draft)
    tensors = {}
    for name, seen in statistics.items():
        tensors[f"{name}/lower"], tensors[f"{name}/upper"] = seen.range()
    for site, fmt in formats.items():
        if fmt.kind == "dynamic_token":
            tensors[f"{site.name}/clip_ratio"] = torch.ones(1)
    return draft.adding(tensors)


def observe(
    context: SearchContext, sites: Sequence[Site], draft: Draft, select: Callable[[Tensor], Tensor] | None = None
) -> dict[str, ChannelStatistics]:
    """Channel statistics of each site's input over the calibration set, by site name.

    Args:
        context, draft: see `visit_site_inputs`.
        sites: the sites to observe; if there are none, nothing runs.
        select: returns a non-empty selection, or other features, of the tokens [N, C] of a batch; None: all tokens.
    """

    def visit(site: Site, tokens: Tensor) -> ChannelStatistics:
        return ChannelStatistics.of(tokens if select is None else select(tokens))

    found = visit_site_inputs(context, sites, visit, "ranges", draft) if sites else {}
    return {site.name: seen for site, seen in found.items()}
