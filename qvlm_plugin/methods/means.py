"""Mean inputs of Linears, by which their biases make up for rounded weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.methods.rtn import observe_ranges
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.topology import Site

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


def mean_inputs(
    loaded: LoadedModel,
    sites: Sequence[Site],
    calibration: CalibrationSet,
    batch_size: int,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The plan tensor ``<site>/mean`` [C] of each site: over the calibration set's `ordinary` tokens.

    Inputs of the sites named in ``scales`` are divided by these [C] first, as in the model with the scales folded.

    Raises:
        QVLMError: an input is not finite.
    """
    statistics = observe_ranges(loaded, list(sites), calibration, batch_size, scales, ordinary)
    return {f"{name}/mean": seen.mean for name, seen in statistics.items()}
