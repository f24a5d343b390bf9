"""Visual encoder optimization (VEO): train the quantization parameters of the vision tower by gradient.

Paper, section 3.3, Eq. 8-10. The whole model is run with straight-through rounding, and

    L = L_reg + λ1 L_ent + λ2 L_err

is minimised on calibration data: the loss of the answers, the entropy of the language model's layers, and the distance
from the full-precision model. What is trained is few numbers: a clip ratio for each dynamic site of the tower and, with
``clip+norm``, the affine terms of its layer norms. All else is frozen, and the model is left as it was found.

The paper prints L_ent without a minus sign and says that entropy is minimised; so it is here. It gives no λ1, λ2 or
learning rates. Our terms are of order one whatever the model: nats, nats, and distances relative to full precision.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.reference import STRAIGHT_THROUGH
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.blocks import replaced, stand_in
from qvlm_plugin.methods.build import activation_sites, build_plan
from qvlm_plugin.methods.gradients import LOSS_SCALE, checkpointed, frozen, last_positions, require_answers
from qvlm_plugin.methods.qvlm.dependency import conditional_entropy, joint_counts, sample_elements
from qvlm_plugin.methods.qvlm.options import VisionOptions
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import execution_device, materialized
from qvlm_plugin.observers import ChannelStatistics
from qvlm_plugin.progress import Progress, track
from qvlm_plugin.quantizers import widen
from qvlm_plugin.scheme import UNQUANTIZED, Scheme
from qvlm_plugin.topology import Site, Topology, decoder_layers

ENTROPY_ELEMENTS = 2**14
"""Elements of each batch and layer that entropies are estimated from."""

MIN_CLIP_RATIO = 0.1
"""Training does not pull a token's range in further than this."""


@dataclass(frozen=True, eq=False)
class VisionResult:
    """What the training found.

    Attributes:
        tensors: ``<site>/clip_ratio`` of the tower's sites, ``<parameter>/value`` of the norms' changed parameters.
        replaced: names of these parameters.
        before, after: ``total``, ``reg``, ``ent``, ``err`` of the untrained and of the trained parameters, as means
            over the batches; with the same layer weights, so that they compare.
        curve: for each epoch ``epoch``, and the same means over its steps, with the layer weights of the epoch.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def record(self) -> dict[str, Any]:
        """The course of the training, as JSON data."""
        return {"before": self.before, "after": self.after, "curve": self.curve}


# The terms of the objective


class Terms(NamedTuple):
    """Scalars of one batch: L (Eq. 10) and its unweighted terms."""

    total: Tensor
    reg: Tensor
    ent: Tensor
    err: Tensor


def answer_loss(logits: Tensor, input_ids: Tensor, answer: Tensor) -> Tensor:
    """L_reg: mean cross-entropy of the answers' tokens.

    Args:
        logits: [B, K, V] of the last K positions; one more than the longest answer.
        input_ids: int64 [B, T].
        answer: bool [B, T], the answers' tokens.
    """
    count = logits.shape[1] - 1
    answer = answer[:, -count:]
    return F.cross_entropy(widen(logits[:, :-1][answer]), input_ids[:, -count:][answer])


def entropy_loss(
    layers: Sequence[Tensor], bounds: Sequence[tuple[Tensor, Tensor]], weights: Tensor, bits: int
) -> Tensor:
    """L_ent (Eq. 8): sum of w_k D(k, k+1) over consecutive layers.

    Args:
        layers: outputs of the n layers, all of one shape.
        bounds: (lower, upper) of each, which broadcast against it.
        weights: w [n - 1].
        bits: activation width.
    """
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    for k, weight in enumerate(weights):
        here, (lower, upper) = layers[k], bounds[k]
        above, above_lower, above_upper = (tensor.to(here.device) for tensor in (layers[k + 1], *bounds[k + 1]))
        joint = joint_counts(here, above, (lower, upper), (above_lower, above_upper), bits)
        total = total + weight * conditional_entropy(joint).to(total.device)
    return total


def relative_error(quantized: Tensor, reference: Tensor) -> Tensor:
    """‖quantized - reference‖ / ‖reference‖: a norm of Eq. 9, made independent of the model's scale and the batch."""
    reference = widen(reference.to(quantized.device))
    return (widen(quantized) - reference).norm() / reference.norm()


def jacobian_weights(error: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """w_k = ‖∂E/∂x^(k)‖ of each layer that has a successor, scaled to sum to 1 (Eq. 8); equal where all are 0.

    Args:
        error: E, a scalar computed from the layers' outputs.
        layers: outputs of the n layers.

    Returns:
        float64 [n - 1] on the error's device.
    """
    gradients = torch.autograd.grad(error * LOSS_SCALE, layers[:-1])
    norms = torch.stack([widen(gradient).norm().double().to(error.device) for gradient in gradients])
    return norms / norms.sum() if norms.sum() > 0 else torch.full_like(norms, 1 / len(norms))


# The objective on a model


@dataclass(frozen=True, eq=False)
class Reference:
    """A calibration batch, and what the full-precision model makes of it; kept on the CPU.

    Attributes:
        inputs: of the model.
        answer: bool [B, T], the answers' tokens.
        features: vision features that the projector reads.
        hidden: last hidden state [N, C] of the N tokens that are not padding.
        elements: int64 [E], positions in the flattened output [B, T, C] of a layer, for entropies.
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
    """One forward pass: the features that the projector reads, outputs of decoder layers and the last hidden state
    [B, T, C], logits [B, K, V]."""

    features: Tensor
    layers: list[Tensor]
    hidden: Tensor
    logits: Tensor


def run(loaded: LoadedModel, topology: Topology, inputs: Mapping[str, Tensor], answer: Tensor) -> Run:
    """The model, as it is now, on a batch; logits of the answers and of the token before them."""
    model, seen = loaded.model, {"layers": []}
    handles = [
        model.get_submodule(topology.projector_path).register_forward_pre_hook(
            lambda _, args: seen.__setitem__("features", args[0])
        ),
        model.get_submodule(topology.decoder_path).register_forward_hook(
            lambda _, args, output: seen.__setitem__("hidden", output.last_hidden_state)
        ),
    ]
    for _, layer in decoder_layers(topology, model):
        handles.append(
            layer.register_forward_hook(
                lambda _, args, output: seen["layers"].append(output[0] if isinstance(output, tuple) else output)
            )
        )
    try:
        longest = int(answer.sum(dim=1).max())
        placed = to_device(inputs, execution_device(model), model.dtype)
        output = model(**placed, use_cache=False, logits_to_keep=last_positions(answer, longest + 1))
    finally:
        for handle in handles:
            handle.remove()
    return Run(logits=output.logits, **seen)


@dataclass(frozen=True, eq=False)
class Objective:
    """Eq. 10 on calibration data. It measures the model as it is when asked, against what it was when made.

    Attributes:
        loaded, topology: the model.
        options: η, λ1 and λ2 are read.
        bits: width of the decoder's activations.
        batches: calibration data.
        bounds: (lower, upper) [C] of each decoder layer's output in full precision.
    """

    loaded: LoadedModel
    topology: Topology
    options: VisionOptions
    bits: int
    batches: tuple[Reference, ...]
    bounds: tuple[tuple[Tensor, Tensor], ...]

    @property
    def has_entropy(self) -> bool:
        """Whether L_ent counts: the decoder's activations have codes, its layers successors, and λ1 is not 0."""
        return self.bits != UNQUANTIZED and len(self.bounds) > 1 and self.options.lambda1 > 0

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        loaded: LoadedModel,
        topology: Topology,
        calibration: CalibrationSet,
        bits: int,
        options: VisionOptions,
    ) -> "Objective":
        """Run the full-precision model once over the calibration set; its seed is that of the entropies' elements."""
        batches, statistics = [], []
        for inputs, answer in track(
            calibration.batches(loaded.processor, options.calibration_batch_size),
            "full precision",
            -(-len(calibration.samples) // options.calibration_batch_size),
        ):
            attended = inputs["attention_mask"].bool()
            seen = run(loaded, topology, inputs, answer)
            tokens = [layer[attended.to(layer.device)] for layer in seen.layers]
            new = [ChannelStatistics.of(layer) for layer in tokens]
            statistics = [old.merge(more) for old, more in zip(statistics, new, strict=True)] if statistics else new
            channels = tokens[0].shape[1]
            drawn = sample_elements(tokens[0].numel(), ENTROPY_ELEMENTS, calibration.seed + len(batches))
            # The drawn elements count tokens without padding; layers are read with it.
            position = attended.flatten().nonzero().squeeze(1)[drawn // channels]
            hidden = seen.hidden[attended.to(seen.hidden.device)]
            elements = position * channels + drawn % channels
            batches.append(Reference(dict(inputs), answer, seen.features.cpu(), hidden.cpu(), elements))
        bounds = tuple((layer.lower, layer.upper) for layer in statistics)
        return cls(loaded, topology, options, bits, tuple(batches), bounds)

    def terms(self, batch: Reference, weights: Tensor) -> Terms:
        """L and its terms on a batch, with layer weights w [n - 1]."""
        seen = run(self.loaded, self.topology, batch.inputs, batch.answer)
        device = seen.logits.device
        reg = answer_loss(seen.logits, batch.inputs["input_ids"].to(device), batch.answer.to(device))
        ent = self._entropy(batch, seen.layers, weights.to(device))
        features = relative_error(seen.features, batch.features).to(device)
        err = features + self.options.eta * self._hidden_error(batch, seen).to(device)
        return Terms(reg + self.options.lambda1 * ent + self.options.lambda2 * err, reg, ent, err)

    def layer_weights(self, batch: Reference) -> Tensor:
        """w [n - 1] of the decoder layers, from one batch; E^(n) is the squared error of the last hidden state."""
        if not self.has_entropy:
            return torch.zeros(len(self.bounds) - 1)
        with torch.enable_grad():
            seen = run(self.loaded, self.topology, batch.inputs, batch.answer)
            return jacobian_weights(self._hidden_error(batch, seen).square(), seen.layers).cpu()

    def _entropy(self, batch: Reference, layers: list[Tensor], weights: Tensor) -> Tensor:
        if not self.has_entropy:
            return torch.zeros((), device=weights.device)
        outputs, bounds = [], []
        for layer, layer_bounds in zip(layers, self.bounds, strict=True):
            elements = batch.elements.to(layer.device)
            outputs.append(layer.flatten()[elements])
            bounds.append(tuple(bound.to(layer.device)[elements % layer.shape[-1]] for bound in layer_bounds))
        return entropy_loss(outputs, bounds, weights, self.bits)

    def _hidden_error(self, batch: Reference, seen: Run) -> Tensor:
        return relative_error(seen.hidden[batch.attended.to(seen.hidden.device)], batch.hidden)


# Training


def optimize_vision(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet,
    options: VisionOptions,
    initial: Mapping[str, Tensor],
) -> VisionResult:
    """Train the vision tower's quantization parameters; the better of before and after is kept.

    Samples without an image say nothing about the tower and are left out. The model's blocks need not fit twice on the
    device with ``veo_decoder=full``; with ``quantized`` the decoder's rounded weights lie beside its own. Of offloaded
    weights one block at a time is on the device, if ``veo_checkpointing`` is on, and the tower all the while.

    Args:
        loaded: the model in full precision; unchanged on return, also when an error is raised.
        topology: its parts.
        scheme: bit widths.
        calibration: samples with answers; its seed decides the order of batches.
        options: see `VisionOptions`.
        initial: the activation parameters to start from, of every site that the scheme rounds, as plan tensors.

    Returns:
        Parameters to put over ``initial``; nothing where the tower has none to train.

    Raises:
        QVLMError: samples have no answer, or the objective is not finite.
    """
    sites = [site for site, _ in activation_sites(topology, loaded, scheme) if site.part == "vision"]
    with ExitStack() as stack:
        # What is trained must stay where it is between forward passes.
        stack.enter_context(materialized(loaded.model.get_submodule(topology.vision_path)))
        norms = _norm_parameters(loaded.model, topology) if options.veo_train == "clip+norm" else {}
        if scheme.vision.is_identity or not (sites or norms):
            return VisionResult()
        calibration = _usable(calibration)
        layers = _straight_through_layers(loaded, topology, scheme, options, initial)
        objective = Objective.of(loaded, topology, calibration, scheme.decoder.activation, options)
        stack.enter_context(frozen(loaded.model))
        # Values that are replaced by themselves: they are put back at the end.
        stack.enter_context(replaced(loaded.model, layers, {name: norm.detach() for name, norm in norms.items()}))
        if options.veo_checkpointing:
            stack.enter_context(checkpointed(_blocks(loaded.model, topology)))
        ratios = _shared_ratios(sites, layers)
        return _train(objective, ratios, norms, calibration.seed)


def _train(
    objective: Objective, ratios: Mapping[str, nn.Parameter], norms: Mapping[str, nn.Parameter], seed: int
) -> VisionResult:
    """Adam on clip ratios (by site) and norms (by parameter name), both already in the model."""
    options, batches = objective.options, objective.batches
    live = {f"{site}/clip_ratio": ratio for site, ratio in ratios.items()}
    live |= {f"{name}/value": norm for name, norm in norms.items()}
    # Steps are smaller than half precision resolves: they are taken on wide copies.
    wide = {key: widen(parameter.detach()).clone() for key, parameter in live.items()}
    # No weight decay: it would pull the ratios, and the norms, towards 0.
    optimizer = torch.optim.Adam(
        [
            {"params": [wide[f"{site}/clip_ratio"] for site in ratios], "lr": options.veo_clip_rate},
            {"params": [wide[f"{name}/value"] for name in norms], "lr": options.veo_norm_rate},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.veo_epochs * len(batches)))
    for parameter in live.values():
        parameter.requires_grad_()
    original = {key: parameter.detach().clone() for key, parameter in live.items()}
    curve = []
    generator = torch.Generator().manual_seed(seed)
    first_weights = objective.layer_weights(batches[0])
    with Progress("visual encoder", (options.veo_epochs + 2) * len(batches)) as progress:

        def means(epoch: int, terms: Iterable[Terms]) -> dict[str, float]:
            rows = []
            for batch_terms in terms:
                rows.append([float(term.detach()) for term in _finite(batch_terms, epoch)])
                progress.advance()
            return dict(zip(Terms._fields, torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist(), strict=True))

        def steps(weights: Tensor, order: Sequence[int]) -> Iterator[Terms]:
            for index in order:
                terms = objective.terms(batches[index], weights)
                yield terms
                _step(terms.total, live, wide, optimizer)
                schedule.step()

        @torch.no_grad()
        def evaluation(epoch: int) -> dict[str, float]:
            return means(epoch, (objective.terms(batch, first_weights) for batch in batches))

        before = evaluation(0)
        for epoch in range(1, options.veo_epochs + 1):
            order = torch.randperm(len(batches), generator=generator).tolist()
            curve.append({"epoch": epoch} | means(epoch, steps(objective.layer_weights(batches[order[0]]), order)))
            progress.describe(f"visual encoder, epoch {epoch}: loss {curve[-1]['total']:.4f}")
        after = evaluation(options.veo_epochs)
    best = live if after["total"] < before["total"] else original
    changed = tuple(name for name in norms if not torch.equal(best[f"{name}/value"], original[f"{name}/value"]))
    keys = [*(f"{site}/clip_ratio" for site in ratios), *(f"{name}/value" for name in changed)]
    return VisionResult({key: best[key].detach().cpu().clone() for key in keys}, changed, before, after, curve)


def _step(
    loss: Tensor, live: Mapping[str, nn.Parameter], wide: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    gradients = torch.autograd.grad(loss * LOSS_SCALE, list(live.values()), allow_unused=True)
    for copy, gradient in zip(wide.values(), gradients, strict=True):
        copy.grad = None if gradient is None else gradient.to(copy.dtype) / LOSS_SCALE
    optimizer.step()
    with torch.no_grad():
        for key, parameter in live.items():
            if key.endswith("/clip_ratio"):
                wide[key].clamp_(MIN_CLIP_RATIO, 1)
            parameter.copy_(wide[key])


def _finite(terms: Terms, epoch: int) -> Terms:
    if not terms.total.isfinite():
        values = ", ".join(f"{name} {term.item():.4g}" for name, term in terms._asdict().items())
        raise QVLMError(
            f"visual encoder optimization: the objective is not finite in epoch {epoch} ({values}); "
            "try dtype=float32 or a smaller veo_clip_rate"
        )
    return terms


def _usable(calibration: CalibrationSet) -> CalibrationSet:
    """The samples with an image; every sample must have an answer."""
    require_answers(calibration, "visual encoder optimization to train on", "veo=false")
    pictured = tuple(sample for sample in calibration.samples if sample.conversation.images)
    return CalibrationSet(pictured, calibration.source, calibration.seed)


def _norm_parameters(model: nn.Module, topology: Topology) -> dict[str, nn.Parameter]:
    """Affine parameters of the tower's layer norms, by full name."""
    return {
        f"{topology.vision_path}.{module_name}.{name}": parameter
        for module_name, module in model.get_submodule(topology.vision_path).named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, parameter in module.named_parameters()
    }


def _straight_through_layers(
    loaded: LoadedModel, topology: Topology, scheme: Scheme, options: VisionOptions, initial: Mapping[str, Tensor]
) -> dict[str, QuantLinear]:
    """What stands in for the Linears while training, by full name."""
    # Tensors made in inference mode cannot take part in gradients; their copies can.
    initial = {name: tensor.clone() for name, tensor in initial.items()}
    layers = {}
    plan = build_plan("qvlm", loaded, topology, scheme, options, initial, None)
    for module in plan.modules:
        if module.is_identity or (module.part == "decoder" and options.veo_decoder == "full"):
            continue
        linear = loaded.model.get_submodule(module.name)
        layers[module.name] = stand_in(module, linear, plan.tensors, STRAIGHT_THROUGH)
    return layers


def _shared_ratios(sites: Sequence[Site], layers: Mapping[str, QuantLinear]) -> dict[str, nn.Parameter]:
    """One clip ratio for each site, made common to its Linears."""
    ratios = {}
    for site in sites:
        ratios[site.name] = layers[site.name].clip_ratio
        for name in site.linears:
            layers[name].clip_ratio = ratios[site.name]
    return ratios


def _blocks(model: nn.Module, topology: Topology) -> list[nn.Module]:
    vision = model.get_submodule(f"{topology.vision_path}.{topology.vision.blocks}")
    return [*vision, *(layer for _, layer in decoder_layers(topology, model))]
