"""Discretization error difference: what searching two layers jointly gains over searching them one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm_plugin import plugins
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.blocks import Batch, Hidden, decoder_inputs, output_error, run_layer
from qvlm_plugin.methods.build import activation_sites, build_plan
from qvlm_plugin.methods.qlora import search_ranges
from qvlm_plugin.methods.qvlm.dependency import MAX_ELEMENTS, conditional_entropy, joint_counts, sample_elements
from qvlm_plugin.methods.qvlm.mining import CandidateLayer, candidate_layer, search_block
from qvlm_plugin.methods.qvlm.options import QVLMOptions
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.progress import track
from qvlm_plugin.scheme import UNQUANTIZED, Scheme
from qvlm_plugin.topology import decoder_layers, resolve


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
    loaded: LoadedModel, scheme: Scheme, calibration: CalibrationSet, options: QVLMOptions, layer: int
) -> list[SamplePoint]:
    """Entropy and discretization error difference (DED) of every calibration sample at a pair of layers (Figure 2).

    The paper (section 3.2) calls DED "the discretization error difference between the rounding function searched
    sequentially and jointly" for a layer and the following one, and plots it against the activation entropy of one
    layer, a point for each multimodal input. Our reading, for layers k = ``layer`` and k + 1 and each sample alone:

    - sequential: layer k takes the percentile of least squared error of its own output, then layer k + 1 takes, on
      that, the one of least error of *its* output (Eq. 2 twice);
    - joint: of all pairs, the one of least squared error of layer k + 1's output (Eq. 3 on a block of two);
    - DED is the former's error of layer k + 1's output minus the latter's. Both divided by the squared norm of the
      full-precision output, so that samples compare; never negative, because the joint search tries all pairs (with
      ``beam`` it may miss the best).

    The layers below run in full precision: nothing but this pair's rounding is in the difference. The percentiles
    start from the layer-wise ranges of the whole calibration set, and weights are quantized, as in ``method=qvlm``.
    Entropies are of the soft assignment (Eq. 5) of full-precision outputs, with each channel's extremes over the whole
    calibration set as bounds.

    Args:
        loaded: the model in full precision.
        scheme: its decoder's widths are used.
        calibration: the samples.
        options: of the search: grid, reading, tokens, …
        layer: k, from 0.

    Raises:
        QVLMError: there is no layer after it, or the scheme does not round the decoder's activations.
    """
    model, bits = loaded.model, scheme.decoder.activation
    topology = plugins.topology(model.config)
    layers = decoder_layers(topology, model)
    if not 0 <= layer < len(layers) - 1:
        raise QVLMError(f"layer={layer}: the decoder's layers with a following one are 0 to {len(layers) - 2}")
    if bits == UNQUANTIZED:
        raise QVLMError(f"scheme={scheme}: it must round the decoder's activations, for example w4a4")
    sites = [site for site in resolve(topology, model) if site.part == "decoder" and site.block in (layer, layer + 1)]
    formats = [(site, fmt) for site, fmt in activation_sites(topology, loaded, scheme) if site in sites]
    tensors = search_ranges(loaded, formats, calibration, options)
    modules = {
        module.name: module for module in build_plan("qvlm", loaded, topology, scheme, options, {}, None).modules
    }
    start, batches = decoder_inputs(loaded, topology, calibration, batch_size=1)
    for named in layers[:layer]:
        start = run_layer(*named, start, batches)
    members, targets, reference = [], [], start
    for named in layers[layer : layer + 2]:
        member, reference = candidate_layer(*named, sites, modules, tensors, reference, batches, options)
        members.append(member)
        targets.append(reference)
    counts = _joint_counts(*targets, batches, bits)
    points = []
    for index, batch in enumerate(track(batches, "searching pairs")):
        here, above = (target[index : index + 1] for target in targets)
        sequential, joint = _search_pair(members, start[index : index + 1], here, above, batch, options)
        marginal = counts[index].sum(dim=1) / counts[index].sum()
        points.append(
            SamplePoint(
                entropy=float(torch.special.entr(marginal).sum()),
                dependency=float(conditional_entropy(counts[index])),
                sequential=sequential,
                joint=joint,
            )
        )
    return points


def _search_pair(
    members: list[CandidateLayer], start: Hidden, here: Hidden, above: Hidden, batch: Batch, options: QVLMOptions
) -> tuple[float, float]:
    """Relative errors of the second layer's output on one sample: searched layer by layer, and jointly."""
    first, second = members
    (choices,), _ = search_block([first], start, [here], [batch], options)
    _, sequential = search_block([second], first.run(choices, start, [batch]), [above], [batch], options)
    _, joint = search_block(members, start, [here, above], [batch], options)
    zeros = [torch.zeros_like(states) for states in above]
    norm = output_error(zeros, above, [batch], options.tokens, options.relative_error)
    return sequential / norm, joint / norm


def _joint_counts(here: Hidden, above: Hidden, batches: list[Batch], bits: int) -> list[Tensor]:
    """The joint histogram of two layers' codes for every sample; a channel's bounds are common to all samples."""
    outputs = [
        [states[batch.attended.to(states.device)] for states, batch in zip(hidden, batches, strict=True)]
        for hidden in (here, above)
    ]
    bounds = []
    for tokens in outputs:
        extremes = [one.aminmax(dim=0) for one in tokens]
        lower, upper = (torch.stack(side) for side in zip(*extremes, strict=True))
        bounds.append((lower.amin(dim=0), upper.amax(dim=0)))
    counts = []
    for pair in zip(*outputs, strict=True):
        chosen = sample_elements(pair[0].numel(), MAX_ELEMENTS, seed=0).to(pair[0].device)
        channels = chosen % pair[0].shape[1]
        elements = [tokens.flatten()[chosen] for tokens in pair]
        counts.append(joint_counts(*elements, *[(lower[channels], upper[channels]) for lower, upper in bounds], bits))
    return counts
