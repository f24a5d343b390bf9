"""Discretization error difference: the gain of searching two layers jointly instead of one after the other."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qvlm_plugin import plugins
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.methods.hidden import HiddenCache, block_inputs
from qvlm_plugin.methods.lp import least_distance
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.qvlm.dependency import (
    MAX_ELEMENTS,
    Assignment,
    conditional_entropy,
    joint_counts,
    sample_elements,
)
from qvlm_plugin.methods.qvlm.mining import CandidateLayer, candidate_layer, search_block
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.progress import track
from qvlm_plugin.scheme import UNQUANTIZED, Scheme


@dataclass(frozen=True)
class SamplePoint:
    """One sample at one pair of layers k and k + 1.

    Attributes:
        entropy: H of layer k's rounded output, in nats.
        dependency: H of layer k + 1's rounded output given layer k's, D(k, k + 1) of Eq. 4, in nats.
        sequential, joint: relative squared error of layer k + 1's output after each search.
    """

    entropy: float
    dependency: float
    sequential: float
    joint: float

    @property
    def difference(self) -> float:
        """The discretization error difference (DED)."""
        return self.sequential - self.joint


def sample_points(
    loaded: LoadedModel, scheme: Scheme, calibration: CalibrationSet, options: MethodOptions, layer: int
) -> list[SamplePoint]:
    """Entropy and discretization error difference (DED) of every calibration sample at a pair of layers (Figure 2).

    The paper (section 3.2) calls DED "the discretization error difference between the rounding function searched
    sequentially and jointly" for a layer and the following one, and plots it against the activation entropy of one
    layer, a point for each multimodal input. Our reading, for layers k = ``layer`` and k + 1 and each sample alone:

    - sequential: layer k takes the percentile with the least squared error of its own output; then layer k + 1, fed
      with that output, takes the one with the least error of *its* output (Eq. 2 twice);
    - joint: of all pairs, the one with the least squared error of layer k + 1's output (Eq. 3 on a block of two);
    - DED is the sequential search's error of layer k + 1's output minus the joint search's. Errors are divided by the
      squared norm of the full-precision output, to make samples comparable. DED is never negative, because the joint
      search tries all pairs (with ``beam`` it may miss the best).

    Earlier layers run in full precision, so the difference is due to this pair's rounding alone. The percentiles
    start from the layer-wise ranges of the whole calibration set, and weights are quantized, as in ``method=qvlm``.
    Entropies are those of the soft assignment (Eq. 5) of full-precision outputs, bounded by each channel's extremes
    over the whole calibration set.

    Args:
        loaded: the model in full precision.
        scheme: bit widths; only the decoder's are used.
        calibration: the samples.
        options: options of the search: grid, reading, tokens, …
        layer: index k, from 0.

    Raises:
        QVLMError: no layer follows it, or the scheme does not round the decoder's activations.
    """
    bits = scheme.decoder.activation
    context = SearchContext(loaded, plugins.topology_of(loaded), scheme, options, calibration, "qvlm")
    if not 0 <= layer < len(context.layers) - 1:
        raise QVLMError(f"layer={layer} is not allowed; allowed are 0 to {len(context.layers) - 2}")
    if bits == UNQUANTIZED:
        raise QVLMError(f"scheme={scheme}: it must round the decoder's activations, for example w4a4")
    formats = {
        site: fmt
        for site, fmt in context.activation_sites.items()
        if site.part == "decoder" and site.block in (layer, layer + 1)
    }
    plan = build_plan(context, Draft(least_distance(context, Draft(), formats)))
    start = block_inputs(replace(context, options=options.model_copy(update={"calibration_batch_size": 1})))
    for named in context.layers[:layer]:
        start = start.through(*named)
    members, targets, reference = [], [], start
    for index in (layer, layer + 1):
        member, reference = candidate_layer(context, plan, index, reference)
        members.append(member)
        targets.append(reference)
    counts = _joint_counts(*targets, Assignment.of(options, bits))
    points = []
    for index, joint in enumerate(track(counts, "searching pairs")):
        sample = [states.batch(index) for states in (start, *targets)]
        sequential, jointly = _search_pair(members, *sample, options)
        points.append(
            SamplePoint(
                entropy=float(torch.special.entr(joint.sum(dim=1) / joint.sum()).sum()),
                dependency=float(conditional_entropy(joint)),
                sequential=sequential,
                joint=jointly,
            )
        )
    return points


def _search_pair(
    members: list[CandidateLayer],
    start: HiddenCache,
    outputs: HiddenCache,
    next_outputs: HiddenCache,
    options: MethodOptions,
) -> tuple[float, float]:
    """Relative errors of the second layer's output on one sample, after the layer-wise and the joint search."""
    first, second = members
    (choices,) = search_block([first], start, [outputs], options).choices
    sequential = search_block([second], first.run(choices, start), [next_outputs], options).error
    joint = search_block(members, start, [outputs, next_outputs], options).error
    zeros = replace(next_outputs, states=[torch.zeros_like(states) for states in next_outputs.states])
    norm = zeros.error(next_outputs, options)
    return sequential / norm, joint / norm


def _joint_counts(layer: HiddenCache, next_layer: HiddenCache, assignment: Assignment) -> list[Tensor]:
    """The joint histogram of two layers' codes for every sample, with the same channel bounds for all samples."""
    samples = range(len(layer.states))
    outputs = [[hidden.batch(index).tokens() for index in samples] for hidden in (layer, next_layer)]
    bounds = []
    for tokens in outputs:
        extremes = [sample.aminmax(dim=0) for sample in tokens]
        lower, upper = (torch.stack(side) for side in zip(*extremes, strict=True))
        bounds.append((lower.amin(dim=0), upper.amax(dim=0)))
    counts = []
    for pair in zip(*outputs, strict=True):
        chosen = sample_elements(pair[0].numel(), MAX_ELEMENTS, seed=0).to(pair[0].device)
        channels = chosen % pair[0].shape[1]
        elements = [tokens.flatten()[chosen] for tokens in pair]
        counts.append(
            joint_counts(*elements, *[(lower[channels], upper[channels]) for lower, upper in bounds], assignment)
        )
    return counts
