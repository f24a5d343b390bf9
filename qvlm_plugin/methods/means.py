"""Mean inputs of Linears: biases make up for rounded weights by them, and tokens are centered by them."""

from torch import Tensor

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.minmax import observe

MASSIVE = 20.0
"""Tokens of more than this times the median norm are left out of the means."""


def ordinary(tokens: Tensor) -> Tensor:
    """The tokens of ``tokens`` [N, C] without those of massive activations, in float32.

    A few tokens, the first one above all, are hundreds of times as large as the others. What they add to an output is
    the same in every document and is theirs alone; in a mean it would be laid on all others.
    """
    tokens = tokens.float()
    norms = tokens.norm(dim=1)
    return tokens[norms <= MASSIVE * norms.median()]


def observe_means(context: SearchContext, draft: Draft) -> Draft:
    """The plan tensors ``<site>/mean``, where biases are corrected, and ``<site>/center``, where tokens are centered:
    both [C], over the `ordinary` calibration tokens.

    Raises:
        QVLMError: an input is not finite.
    """
    options, formats = context.options, context.activation_sites
    corrected = set(context.weight_sites if options.bias_correction else ())
    centered = {site for site, fmt in formats.items() if options.center and fmt.kind == "dynamic_token"}
    statistics = observe(context, [site for site in context.sites if site in corrected | centered], draft, ordinary)
    tensors = {}
    for key, sites in (("mean", corrected), ("center", centered)):
        tensors |= {f"{site.name}/{key}": statistics[site.name].mean for site in sites if site.name in statistics}
    return draft.adding(tensors)
