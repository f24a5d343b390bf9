"""Mean inputs of Linears, for the bias correction of rounded weights and for centering tokens."""

from torch import Tensor

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.minmax import observe

MASSIVE = 20.0
"""Tokens whose norm exceeds the median by more than this factor are left out of the means."""


def ordinary(tokens: Tensor) -> Tensor:
    """The tokens of ``tokens`` [N, C] without those with massive activations, in float32.

    The norm of a few tokens, above all of the first, is hundreds of times that of the others. They would dominate a
    mean, which would then describe none of the other tokens.
    """
    tokens = tokens.float()
    norms = tokens.norm(dim=1)
    return tokens[norms <= MASSIVE * norms.median()]


def observe_means(context: SearchContext, draft: Draft) -> Draft:
    """Add ``<site>/mean`` for sites whose biases are corrected, ``<site>/center`` for sites whose tokens are centered.

    Both are the mean input [C] over the `ordinary` calibration tokens.

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
