"""Visual encoder optimization (VEO): train the quantization parameters of the vision tower by gradient descent.

Paper, section 3.3. The whole model runs with straight-through rounding, and the `Objective` is minimised on calibration
data. Few parameters are trained: a clip ratio for each dynamic site of the tower and, with ``clip+norm``, the affine
terms of its layer norms. All others are frozen, and the model is restored at the end. The paper gives no learning
rates.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.reference import STRAIGHT_THROUGH
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.methods.gradients import OverflowedError, checkpointed, frozen, require_answers, with_loss_scale
from qvlm_plugin.methods.qvlm.objective import Objective, Terms
from qvlm_plugin.methods.replacements import Replacements, quantized_modules, replaced
from qvlm_plugin.methods.shard import Shard
from qvlm_plugin.models.placement import materialized
from qvlm_plugin.progress import Progress
from qvlm_plugin.quantizers import widen
from qvlm_plugin.topology import Site

MIN_CLIP_RATIO = 0.1
"""Lower bound of clip ratios in training."""


def train_tower(context: SearchContext, draft: Draft) -> Draft:
    """`train` in the first of several processes: its optimizer steps are sequential."""
    return context.shard.first(lambda: train(replace(context, shard=Shard()), draft))


def train(context: SearchContext, draft: Draft) -> Draft:
    """Train the vision tower's quantization parameters; keep the initial ones if the objective did not improve.

    Samples without an image are left out. With ``veo_decoder=quantized`` the decoder's rounded weights replace its own
    on the device, which are moved to the CPU for the time. If weights are offloaded, the tower stays on the device, and
    with ``veo_checkpointing`` one other block at a time. Finished epochs are kept in the workspace.

    Args:
        context: the search; its samples have answers, and the calibration set's seed decides the order of batches.
        draft: draft with the initial activation parameters of every site that the scheme rounds.

    Raises:
        QVLMError: the objective is not finite.
    """
    model, topology, options = context.model, context.topology, context.options
    sites = [site for site in context.activation_sites if site.part == "vision"]
    with ExitStack() as stack:
        # Trained parameters must stay on the device between forward passes.
        stack.enter_context(materialized(model.get_submodule(topology.vision_path)))
        norms = _norm_parameters(context) if options.veo_train == "clip+norm" else {}
        if context.scheme.vision.is_identity or not (sites or norms):
            return draft
        context = replace(context, calibration=_with_images(context.calibration))
        objective = Objective.of(context, draft)
        # Tensors made in inference mode cannot take part in gradients; their copies can.
        started = replace(draft, tensors={name: tensor.clone() for name, tensor in draft.tensors.items()})
        paths = (*topology.paths("vision"), *topology.paths("projector"))
        if options.veo_decoder == "quantized":
            paths = (*paths, topology.decoder_path)
        others = quantized_modules(build_plan(context, started), model, STRAIGHT_THROUGH, paths, stack)
        ratios = _shared_ratios(sites, others.linears)
        stack.enter_context(frozen(model))
        # Trained norms that the plan does not change get their own values: this context restores all at the end.
        own = {name: norm.detach() for name, norm in norms.items()}
        stack.enter_context(replaced(model, Replacements(others.linears, {**own, **others.values})))
        if options.veo_checkpointing:
            stack.enter_context(checkpointed(_blocks(context)))
        if context.footprint.caches_on_cpu:
            stack.enter_context(torch.autograd.graph.save_on_cpu())
        return _Training(objective, ratios, norms).run(draft)


class _Training:
    """Adam on clip ratios (by site) and norms (by parameter name), both already in the model."""

    def __init__(
        self, objective: Objective, ratios: Mapping[str, nn.Parameter], norms: Mapping[str, nn.Parameter]
    ) -> None:
        options = objective.context.options
        self.objective, self.options, self.norms = objective, options, norms
        self.live = {f"{site}/clip_ratio": ratio for site, ratio in ratios.items()}
        self.largest = {
            f"{site.name}/clip_ratio": f.largest_ratio for site, f in objective.context.activation_sites.items()
        }
        self.live |= {f"{name}/value": norm for name, norm in norms.items()}
        for parameter in self.live.values():
            parameter.requires_grad_()
        self.original = {key: parameter.detach().clone() for key, parameter in self.live.items()}
        # Steps are smaller than the resolution of half precision: the optimizer works on float32 copies.
        self.wide = {key: widen(parameter.detach()).clone() for key, parameter in self.live.items()}
        # No weight decay: it would pull the ratios, and the norms, towards 0.
        self.optimizer = torch.optim.Adam(
            [
                {"params": [self.wide[f"{site}/clip_ratio"] for site in ratios], "lr": options.veo_clip_rate},
                {"params": [self.wide[f"{name}/value"] for name in norms], "lr": options.veo_norm_rate},
            ]
        )
        steps = max(1, options.veo_epochs * len(objective.batches))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.generator = torch.Generator().manual_seed(objective.context.calibration.seed)
        self.before: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []

    def run(self, draft: Draft) -> Draft:
        """The draft with the trained parameters and a record of the training.

        The record has the terms of the objective before and after, as means over the batches with the same layer
        weights, and the means over the steps of each epoch with that epoch's layer weights.
        """
        objective, batches, epochs = self.objective, self.objective.batches, self.options.veo_epochs
        first_weights = objective.layer_weights(batches[0])
        with Progress("visual encoder", (epochs + 2) * len(batches)) as progress:

            def means(epoch: int, terms: Iterable[Terms]) -> dict[str, float]:
                rows = []
                for batch_terms in terms:
                    rows.append([float(term.detach()) for term in _finite(batch_terms, epoch)])
                    progress.advance()
                columns = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
                return dict(zip(Terms._fields, columns, strict=True))

            @torch.no_grad()
            def evaluation(epoch: int) -> dict[str, float]:
                return means(epoch, (objective.terms(batch, first_weights) for batch in batches))

            self.before = evaluation(0)
            self._resume()
            progress.advance(len(self.curve) * len(batches))
            for epoch in range(len(self.curve) + 1, epochs + 1):
                order = torch.randperm(len(batches), generator=self.generator).tolist()
                weights = objective.layer_weights(batches[order[0]])
                self.curve.append({"epoch": epoch} | means(epoch, self._steps(weights, order, epoch)))
                progress.describe(f"visual encoder, epoch {epoch}: loss {self.curve[-1]['total']:.4f}")
                self._keep()
            after = evaluation(epochs)
        best = self.live if after["total"] < self.before["total"] else self.original
        changed = [
            name for name in self.norms if not torch.equal(best[f"{name}/value"], self.original[f"{name}/value"])
        ]
        keys = [key for key in self.live if key.endswith("/clip_ratio")] + [f"{name}/value" for name in changed]
        found = {key: best[key].detach().cpu().clone() for key in keys}
        # A plan's new values replace the model's own before folds divide them; in training they were divided already.
        for name in changed:
            for scale in _folded_scales(draft, name.rpartition(".")[0]):
                found[f"{name}/value"] *= scale.to(found[f"{name}/value"])
        record = {"veo": {"before": self.before, "after": after, "curve": self.curve}}
        return replace(draft.adding(found, record), replaced=(*draft.replaced, *changed))

    def _steps(self, weights: Tensor, order: Sequence[int], epoch: int) -> Iterator[Terms]:
        for index in order:
            terms, gradients = with_loss_scale(lambda scale, index=index: self._gradients(index, weights, scale, epoch))
            yield terms
            for copy, gradient in zip(self.wide.values(), gradients, strict=True):
                copy.grad = gradient
            self.optimizer.step()
            self._write()
            self.schedule.step()

    def _gradients(self, index: int, weights: Tensor, scale: float, epoch: int) -> tuple[Terms, list[Tensor | None]]:
        terms = self.objective.terms(self.objective.batches[index], weights)
        total = _finite(terms, epoch).total * scale
        found = torch.autograd.grad(total, list(self.live.values()), allow_unused=True)
        gradients = [
            None if gradient is None else gradient.to(copy.dtype) / scale
            for copy, gradient in zip(self.wide.values(), found, strict=True)
        ]
        if not all(gradient is None or gradient.isfinite().all() for gradient in gradients):
            raise OverflowedError(
                f"visual encoder optimization: a gradient is not finite in epoch {epoch}; try dtype=float32"
            )
        return terms, gradients

    @torch.no_grad()
    def _write(self) -> None:
        """Write the float32 copies into the model."""
        for key, parameter in self.live.items():
            if key.endswith("/clip_ratio"):
                self.wide[key].clamp_(MIN_CLIP_RATIO, self.largest[key])
            parameter.copy_(self.wide[key])

    def _keep(self) -> None:
        """Store the state from which the next epoch starts."""
        state = self.optimizer.state_dict()
        data = {"curve": self.curve, "groups": state["param_groups"], "schedule": self.schedule.state_dict()}
        moments = {f"{index}/{name}": value for index, own in state["state"].items() for name, value in own.items()}
        tensors = {f"wide/{key}": value for key, value in self.wide.items()}
        tensors |= {f"adam/{name}": value for name, value in moments.items()}
        tensors["generator"] = self.generator.get_state()
        self.objective.context.workspace.keep("vision-epochs", data, tensors)

    @torch.no_grad()
    def _resume(self) -> None:
        """Restore the state after the last stored epoch, if there is one."""
        kept = self.objective.context.workspace.recall("vision-epochs")
        if kept is None:
            return
        data, tensors = kept
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "adam":
                index, _, moment = rest.partition("/")
                moments.setdefault(int(index), {})[moment] = value
            elif kind == "wide":
                self.wide[rest].copy_(value)
        self.optimizer.load_state_dict({"state": moments, "param_groups": data["groups"]})
        self.schedule.load_state_dict(data["schedule"])
        self.generator.set_state(tensors["generator"])
        self.curve = data["curve"]
        self._write()


def _finite(terms: Terms, epoch: int) -> Terms:
    if not terms.total.isfinite():
        values = ", ".join(f"{name} {term.item():.4g}" for name, term in terms._asdict().items())
        raise QVLMError(
            f"visual encoder optimization: the objective is not finite in epoch {epoch} ({values}); "
            "try dtype=float32 or a smaller veo_clip_rate"
        )
    return terms


def require_answers_to_train_on(context: SearchContext) -> None:
    """Check that every sample has an answer; see `require_answers`."""
    require_answers(context.calibration, "visual encoder optimization to train on", "veo=false")


def _with_images(calibration: CalibrationSet) -> CalibrationSet:
    """The samples with an image."""
    return replace(calibration, samples=tuple(s for s in calibration.samples if s.conversation.images))


def _norm_parameters(context: SearchContext) -> dict[str, nn.Parameter]:
    """Affine parameters of the tower's layer norms, by full name."""
    path = context.topology.vision_path
    return {
        f"{path}.{module_name}.{name}": parameter
        for module_name, module in context.model.get_submodule(path).named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, parameter in module.named_parameters()
    }


def _folded_scales(draft: Draft, producer: str) -> Iterator[Tensor]:
    """The scales by which the draft's folds divide the channels of a norm."""
    for fold in draft.folds:
        if fold.producer == producer:
            yield draft.tensors[f"{fold.site}/scale"]


def _shared_ratios(sites: Sequence[Site], layers: Mapping[str, QuantLinear]) -> dict[str, nn.Parameter]:
    """One clip ratio for each site, shared by its Linears."""
    ratios = {}
    for site in sites:
        ratios[site.name] = layers[site.name].clip_ratio
        for name in site.linears:
            layers[name].clip_ratio = ratios[site.name]
    return ratios


def _blocks(context: SearchContext) -> list[nn.Module]:
    topology = context.topology
    vision = context.model.get_submodule(f"{topology.vision_path}.{topology.vision.blocks}")
    return [*vision, *(layer for _, layer in context.layers)]
