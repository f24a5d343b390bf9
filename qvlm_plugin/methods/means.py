"""Mean inputs of Linears, by which their biases make up for rounded weights."""

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
    """The plan tensor ``<site>/mean`` [C] of each site with rounded weights: over the `ordinary` calibration tokens.

    Raises:
        QVLMError: an input is not finite.
    """
    statistics = observe(context, context.weight_sites, draft, ordinary)
    return draft.adding({f"{name}/mean": seen.mean for name, seen in statistics.items()})
