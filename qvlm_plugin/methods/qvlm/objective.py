"""The objective of visual encoder optimization (paper, Eq. 8-10): L = L_reg + λ1 L_ent + λ2 L_err.

The paper prints L_ent without a minus sign but says that entropy is minimised; this code minimises entropy. The paper
gives no values of λ1 and λ2. Our terms are of order one for every model: nats, nats, and distances relative to full
precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qvlm_plugin.conversation import to_device
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.gradients import OverflowedError, last_positions, with_loss_scale
from qvlm_plugin.methods.qvlm.block_dependency import first_sites, rounded_input
from qvlm_plugin.methods.qvlm.dependency import Assignment, Ranged, conditional_entropy, joint_counts, sample_elements
from qvlm_plugin.observers import ChannelStatistics
from qvlm_plugin.quantizers import widen
from qvlm_plugin.scheme import UNQUANTIZED

ENTROPY_ELEMENTS = 2**14
"""Elements of each batch and layer from which entropies are estimated."""


class Terms(NamedTuple):
    """Scalars of one batch: L (Eq. 10) and its unweighted terms."""

    total: Tensor
    reg: Tensor
    ent: Tensor
    err: Tensor


def answer_loss(logits: Tensor, input_ids: Tensor, answer: Tensor) -> Tensor:
    """L_reg: mean cross-entropy of the answers' tokens.

    Args:
        logits: [B, K, V] of the last K positions; K is the length of the longest answer plus 1.
        input_ids: int64 [B, T].
        answer: bool [B, T], the answers' tokens.
    """
    count = logits.shape[1] - 1
    answer = answer[:, -count:]
    return F.cross_entropy(widen(logits[:, :-1][answer]), input_ids[:, -count:][answer])


def entropy_loss(
    layers: Sequence[Tensor], bounds: Sequence[tuple[Tensor, Tensor]], weights: Tensor, assignment: Assignment
) -> Tensor:
    """L_ent (Eq. 8): sum of w_k D(k, k+1) over consecutive layers.

    Args:
        layers: elements of the rounded tensors of n layers, all of the same shape.
        bounds: (lower, upper) of each, which broadcast against it.
        weights: w [n - 1].
        assignment: how elements are assigned to rounding points.
    """
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    for k, weight in enumerate(weights):
        x, x_bounds = layers[k], bounds[k]
        y, *y_bounds = (tensor.to(x.device) for tensor in (layers[k + 1], *bounds[k + 1]))
        joint = joint_counts(x, y, x_bounds, tuple(y_bounds), assignment)
        total = total + weight * conditional_entropy(joint).to(total.device)
    return total


def relative_error(quantized: Tensor, reference: Tensor) -> Tensor:
    """‖quantized - reference‖ / ‖reference‖: a norm of Eq. 9, independent of the model's scale and the batch size."""
    reference = widen(reference.to(quantized.device))
    return (widen(quantized) - reference).norm() / reference.norm()


def jacobian_weights(error: Tensor, layers: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """w_k = ‖∂E/∂x^(k)‖ of each layer but the last, normalised to sum to 1 (Eq. 8); equal if all are 0.

    Args:
        error: E, a scalar computed from the layers' states.
        layers: x^(k) of the n layers, see `Run`.
        scale: scale of the loss in the backward pass, see `with_loss_scale`.

    Returns:
        float64 [n - 1] on the error's device.

    Raises:
        OverflowedError: a gradient is not finite.
    """
    gradients = torch.autograd.grad(error * scale, layers[:-1])
    norms = torch.stack([widen(gradient).norm().double().to(error.device) for gradient in gradients])
    if not norms.isfinite().all():
        raise OverflowedError("visual encoder optimization: a layer's Jacobian is not finite; try dtype=float32")
    return norms / norms.sum() if norms.sum() > 0 else torch.full_like(norms, 1 / len(norms))


@dataclass(frozen=True, eq=False)
class Reference:
    """A calibration batch and the full-precision model's outputs on it; kept on the CPU.

    Attributes:
        inputs: the model's inputs.
        answer: bool [B, T], the answers' tokens.
        features: vision features that the projector reads; with several projectors, those of the first.
        hidden: last hidden state [N, C] of the N tokens that are not padding.
        elements: int64 [E], positions in flattened hidden states [B, T, C], for entropies.
    """

    inputs: Mapping[str, Tensor]
    answer: Tensor
    features: Tensor
    hidden: Tensor
    elements: Tensor

    @property
    def attended(self) -> Tensor:
        """Bool [B, T], false at padding."""
        return self.inputs["attention_mask"].bool()


class Run(NamedTuple):
    """One forward pass: the features that the projector reads, the inputs of `first_sites`, x^(k) of the decoder's
    layers, the last hidden state [B, T, C], and logits [B, K, V].

    x^(k) is the state whose dependency on x^(k+1) Eq. 8 weights: the input of a layer with ``dependency=site``, which
    compares what two layers read, and its output with ``dependency=output``.
    """

    features: Tensor
    reads: list[Tensor]
    layers: list[Tensor]
    hidden: Tensor
    logits: Tensor


def run(context: SearchContext, inputs: Mapping[str, Tensor], answer: Tensor) -> Run:
    """Run the model in its current state on a batch; logits are those of the answers and of the token before them."""
    model, topology, seen = context.model, context.topology, {"reads": [], "layers": []}
    handles = [
        model.get_submodule(topology.paths("projector")[0]).register_forward_pre_hook(
            lambda _, args: seen.__setitem__("features", args[0])
        ),
        model.get_submodule(topology.decoder_path).register_forward_hook(
            lambda _, args, output: seen.__setitem__("hidden", output.last_hidden_state)
        ),
    ]
    if has_entropy(context):
        for site in first_sites(context):  # hooks only store: a checkpointed layer must repeat the same operations
            handles.append(
                model.get_submodule(site.name).register_forward_pre_hook(lambda _, args: seen["reads"].append(args[0]))
            )
    for _, layer in context.layers:
        if context.options.dependency == "site":
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs: seen["layers"].append((*args, *kwargs.values())[0]), with_kwargs=True
            )
        else:
            handle = layer.register_forward_hook(
                lambda _, args, output: seen["layers"].append(output[0] if isinstance(output, tuple) else output)
            )
        handles.append(handle)
    try:
        longest = int(answer.sum(dim=1).max())
        placed = to_device(inputs, context.device, model.dtype)
        output = model(**placed, use_cache=False, logits_to_keep=last_positions(answer, longest + 1))
    finally:
        for handle in handles:
            handle.remove()
    return Run(logits=output.logits, **seen)


def has_entropy(context: SearchContext) -> bool:
    """Whether L_ent is computed: decoder activations are rounded, there are two layers or more, and λ1 is not 0."""
    rounded = context.scheme.decoder.activation != UNQUANTIZED
    return rounded and len(context.layers) > 1 and context.options.lambda1 > 0


@dataclass(frozen=True, eq=False)
class Objective:
    """Eq. 10 on calibration data: compares the model's current state with its state when the objective was created.

    Attributes:
        context: the search; its options η, λ1, λ2 and ``dependency`` are read.
        draft: draft with the bounds and transforms of the decoder's sites.
        batches: calibration data, with outputs in full precision.
        bounds: (lower, upper) [C] of each layer's x^(k) in full precision, see `Run`.
    """

    context: SearchContext
    draft: Draft
    batches: tuple[Reference, ...]
    bounds: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, context: SearchContext, draft: Draft) -> "Objective":
        """Run the full-precision model once over the calibration set, whose seed also draws the entropies' elements."""
        batches, statistics = [], []
        for inputs, answer in context.batches("full precision"):
            attended = inputs["attention_mask"].bool()
            seen = run(context, inputs, answer)
            new = [ChannelStatistics.of(layer[attended.to(layer.device)]) for layer in seen.layers]
            statistics = [old + more for old, more in zip(statistics, new, strict=True)] if statistics else new
            channels = seen.layers[0].shape[-1]
            drawn = sample_elements(new[0].count * channels, ENTROPY_ELEMENTS, context.calibration.seed + len(batches))
            # Elements are drawn from tokens without padding; the layers' states include padding.
            position = attended.flatten().nonzero().squeeze(1)[drawn // channels]
            hidden = seen.hidden[attended.to(seen.hidden.device)]
            elements = position * channels + drawn % channels
            batches.append(Reference(dict(inputs), answer, seen.features.cpu(), hidden.cpu(), elements))
        bounds = tuple((layer.lower, layer.upper) for layer in statistics)
        return cls(context, draft, tuple(batches), bounds)

    def terms(self, batch: Reference, weights: Tensor) -> Terms:
        """L and its terms on a batch, with layer weights w [n - 1]."""
        options, seen = self.context.options, run(self.context, batch.inputs, batch.answer)
        device = seen.logits.device
        reg = answer_loss(seen.logits, batch.inputs["input_ids"].to(device), batch.answer.to(device))
        ent = self._entropy(batch, seen, weights.to(device))
        features = relative_error(seen.features, batch.features).to(device)
        err = features + options.eta * self._hidden_error(batch, seen).to(device)
        return Terms(reg + options.lambda1 * ent + options.lambda2 * err, reg, ent, err)

    def layer_weights(self, batch: Reference) -> Tensor:
        """w [n - 1] of the decoder layers, from one batch; E^(n) is the squared error of the last hidden state."""
        if not has_entropy(self.context):
            return torch.zeros(len(self.bounds) - 1)

        @torch.enable_grad()
        def weights(scale: float) -> Tensor:
            seen = run(self.context, batch.inputs, batch.answer)
            return jacobian_weights(self._hidden_error(batch, seen).square(), seen.layers, scale).cpu()

        return with_loss_scale(weights)

    def _entropy(self, batch: Reference, seen: Run, weights: Tensor) -> Tensor:
        if not has_entropy(self.context):
            return torch.zeros((), device=weights.device)
        if self.context.options.dependency == "site":
            sites = zip(first_sites(self.context), seen.reads, strict=True)
            layers = [rounded_input(self.context, self.draft, site, x) for site, x in sites]
        else:
            outputs = zip(seen.layers, self.bounds, strict=True)
            layers = [Ranged(x.flatten(0, 1), *(bound.to(x.device) for bound in bounds)) for x, bounds in outputs]
        drawn = [layer.elements(batch.elements.to(layer.states.device)) for layer in layers]
        values, bounds = zip(*drawn, strict=True)
        assignment = Assignment.of(self.context.options, self.context.scheme.decoder.activation)
        return entropy_loss(values, bounds, weights, assignment)

    def _hidden_error(self, batch: Reference, seen: Run) -> Tensor:
        return relative_error(seen.hidden[batch.attended.to(seen.hidden.device)], batch.hidden)
