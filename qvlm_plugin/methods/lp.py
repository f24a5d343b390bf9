"""Layer-wise search of activation ranges, which initialises the paper's baselines and Q-VLM (section 4.1).

For each site, a grid of ratios narrows the observed bounds; the ratio with the least l_p distance between
full-precision and rounded activations is taken (Eq. 2).
"""

from collections.abc import Mapping

from torch import Tensor

from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, centered
from qvlm_plugin.methods.minmax import observe
from qvlm_plugin.methods.observe import visit_site_inputs
from qvlm_plugin.observers import RangeGrid, best_ratio, channel_lp_losses, token_lp_losses
from qvlm_plugin.topology import Site


def search_ranges(context: SearchContext, draft: Draft) -> Draft:
    """Add the ranges of every site; with ``importance=jacobian``, those of all but static sites."""
    formats = context.activation_sites
    if context.options.importance == "jacobian":
        formats = {site: fmt for site, fmt in formats.items() if fmt.kind != "static_channel"}
    return draft.adding(least_distance(context, draft, formats) if formats else {})


def least_distance(context: SearchContext, draft: Draft, formats: Mapping[Site, ActivationFormat]) -> dict[str, Tensor]:
    """The plan tensors of sites, with the ratio of least l_p distance; of equal ratios the widest."""
    options = context.options
    statistics = observe(context, [site for site, fmt in formats.items() if fmt.kind == "static_channel"], draft)

    def visit(site: Site, tokens: Tensor) -> Tensor:
        fmt = formats[site]
        grid = RangeGrid(options.ratios, fmt.bits, options.norm, fmt.reach)
        if fmt.kind == "dynamic_token":
            return token_lp_losses(centered(draft, site, tokens), grid)
        seen = statistics[site.name].to(tokens.device)
        losses = channel_lp_losses(tokens, seen, grid)
        return losses if options.ranges == "channel" else losses.sum(dim=1)

    losses = visit_site_inputs(context, list(formats), visit, "range search", draft)
    tensors = {}
    for site, fmt in formats.items():
        if site not in losses:  # an expert that no calibration token reached
            continue
        ratio = best_ratio(losses[site], options.ratios)
        if fmt.kind == "static_channel":
            seen = statistics[site.name].to(ratio.device)
            tensors[f"{site.name}/lower"], tensors[f"{site.name}/upper"] = seen.range(ratio)
        else:
            tensors[f"{site.name}/clip_ratio"] = ratio.view(1).cpu()
    return tensors
