"""Drafts of plans: the results of a search's steps, and the plan built from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, clipped_format, stored_format
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.plan import RoundingPlan, factors_of
from qvlm_plugin.plan_header import CalibrationRecord, Fold, ModulePlan, Rotation
from qvlm_plugin.rotation import rotate
from qvlm_plugin.scheme import UNQUANTIZED, BitWidths
from qvlm_plugin.topology import ORDER, Site, Topology, kept_linears, linear_layers

TokenWeights = list[list[Tensor]]
"""For each decoder layer and batch, the factors of the squared errors of the layer's output tokens: float32 [B, T]."""

_TOKEN_WEIGHTS = "token_weights"


@dataclass(frozen=True, eq=False)
class Draft:
    """The results of the steps so far.

    Attributes:
        tensors, folds, replaced, rotations, record: content of the plan, see `RoundingPlan`.
        token_weights: weights that one step passes to later ones; not part of the plan.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()
    replaced: tuple[str, ...] = ()
    rotations: tuple[Rotation, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    token_weights: TokenWeights | None = None

    def adding(self, tensors: Mapping[str, Tensor] | None = None, record: Mapping[str, Any] | None = None) -> "Draft":
        """The draft with more tensors and record entries, which replace those of the same names."""
        return replace(self, tensors={**self.tensors, **(tensors or {})}, record={**self.record, **(record or {})})

    def with_codes(self, found: Mapping[str, Tensor]) -> "Draft":
        """The draft with the codes of Linears and their scales, which replace the Linears' ``clip``."""
        clips = {f"{name.removesuffix('/codes')}/clip" for name in found if name.endswith("/codes")}
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in clips}
        return replace(self, tensors={**kept, **found})

    def to(self, device: torch.device | str, **options: Any) -> "Draft":
        """The draft with its tensors on a device; ``options`` are those of `Tensor.to`."""
        weights = self.token_weights and [
            [tensor.to(device, **options) for tensor in layer] for layer in self.token_weights
        ]
        tensors = {name: tensor.to(device, **options) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, token_weights=weights)

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The draft as JSON data and tensors, for `Workspace.keep`."""
        weights = {
            f"{_TOKEN_WEIGHTS}/{layer}/{batch}": tensor
            for layer, batches in enumerate(self.token_weights or ())
            for batch, tensor in enumerate(batches)
        }
        data = {
            "folds": [fold.model_dump() for fold in self.folds],
            "rotations": [rotation.model_dump() for rotation in self.rotations],
            "replaced": list(self.replaced),
            "record": dict(self.record),
        }
        return {**data, _TOKEN_WEIGHTS: [len(batches) for batches in self.token_weights or ()]}, {
            **self.tensors,
            **weights,
        }

    @classmethod
    def restored(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Draft":
        """The draft from what `stored` returned."""
        tensors = dict(tensors)
        weights = [
            [tensors.pop(f"{_TOKEN_WEIGHTS}/{layer}/{batch}") for batch in range(count)]
            for layer, count in enumerate(data[_TOKEN_WEIGHTS])
        ]
        folds = tuple(map(Fold.model_validate, data["folds"]))
        rotations = tuple(map(Rotation.model_validate, data["rotations"]))
        return cls(tensors, folds, tuple(data["replaced"]), rotations, data["record"], weights or None)


def transformed(plan: Draft | RoundingPlan, site: Site, tokens: Tensor) -> Tensor:
    """The input of ``site`` in the transformed model, from its input ``tokens`` [..., C] in the original one."""
    scale = _scale(plan, site, tokens)
    return rotated(plan, site, tokens if scale is None else tokens / scale)


def transformed_gradient(plan: Draft | RoundingPlan, site: Site, gradient: Tensor) -> Tensor:
    """The gradient with respect to the output of `transformed`, from the gradient with respect to its input."""
    scale = _scale(plan, site, gradient)
    gradient = gradient if scale is None else gradient * scale
    found = _factors(plan, site, gradient)
    return gradient if found is None else rotate(gradient, found[1])  # a scale multiplies gradients, as it does weights


def centered(plan: Draft | RoundingPlan, site: Site, tokens: Tensor) -> Tensor:
    """`transformed` tokens minus the site's center, if it has one."""
    center = plan.tensors.get(f"{site.name}/center")
    return tokens if center is None else tokens.float() - center.to(tokens.device)


def rotated(plan: Draft | RoundingPlan, site: Site, tokens: Tensor) -> Tensor:
    """Tokens multiplied by the site's rotation, if there is one."""
    found = _factors(plan, site, tokens)
    return tokens if found is None else rotate(tokens, found[0])


def _factors(plan: Draft | RoundingPlan, site: Site, x: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
    for rotation in plan.rotations:
        if rotation.site == site.name:
            return factors_of(rotation, plan.tensors, x.device)
    return None


def _scale(plan: Draft | RoundingPlan, site: Site, tokens: Tensor) -> Tensor | None:
    for fold in plan.folds:
        if fold.site == site.name:
            return fold.spread(plan.tensors[f"{site.name}/scale"], tokens.shape[-1]).to(tokens)
    return None


def build_plan(context: SearchContext, draft: Draft) -> RoundingPlan:
    """The plan that gives every Linear at a site the formats of its part, and leaves all others unquantized.

    The draft's tensors decide the rest of the formats: a weight with ``<linear>/clip`` is clipped, one with
    ``<linear>/codes`` is stored (`quantizers.stored_parameters`); with ``<site>/mean`` the biases of quantized weights
    are corrected, with ``<site>/center`` tokens are centered. Experts that no calibration token reached have no bounds:
    their inputs are rounded per token, which needs no data, and the plan's record lists them as ``uncalibrated``.
    """
    tensors, uncalibrated = dict(draft.tensors), []
    site_of = {name: site for site in context.sites for name in site.linears}
    kept = kept_linears(context.topology, context.model)
    modules = []
    for name, linear in linear_layers(context.model).items():
        site = site_of.get(name)
        widths = getattr(context.scheme, site.part) if site else BitWidths(UNQUANTIZED, UNQUANTIZED)
        part = site.part if site else "other" if name in kept else _part_of(name, context.topology)
        weight = context.options.weight_format(widths.weight)
        activation = context.options.activation_format(part, widths.activation)
        if f"{name}/codes" in tensors:
            weight = stored_format(weight)
        elif f"{name}/clip" in tensors:
            weight = clipped_format(weight)
        if site and f"{site.name}/mean" in tensors and weight.kind != "none":
            weight = weight.model_copy(update={"corrected": True})
        if site and f"{site.name}/center" in tensors:
            activation = activation.model_copy(update={"centered": True})
        if site and site.expert and any(f"{site.name}/{key}" not in tensors for key in activation.parameters):
            activation = ActivationFormat(kind="dynamic_token", bits=activation.bits)
            tensors[f"{site.name}/clip_ratio"] = torch.ones(1)
            uncalibrated += [site.name] if name == site.name else []
        modules.append(
            ModulePlan(
                name=name,
                part=part,
                site=site.name if site else None,
                shape=(linear.out_features, linear.in_features),
                weight=weight,
                activation=activation,
            )
        )
    return RoundingPlan(
        method=context.method,
        scheme=str(context.scheme),
        options=context.options.model_dump(),
        model=context.loaded.fingerprint,
        modules=tuple(modules),
        tensors=tensors,
        folds=draft.folds,
        replaced=draft.replaced,
        rotations=draft.rotations,
        calibration=_calibration_record(context),
        record={**draft.record, **({"uncalibrated": uncalibrated} if uncalibrated else {})},
    )


def _calibration_record(context: SearchContext) -> CalibrationRecord | None:
    data = context.calibration
    if data is None:
        return None
    return CalibrationRecord(source=data.source, seed=data.seed, digests=data.digests(), conv=context.loaded.conv)


def _part_of(name: str, topology: Topology) -> str:
    """A siteless Linear's part: ``unused`` inside a part (blocks after the feature layer), else ``other``."""
    paths = [path for part in ORDER for path in topology.paths(part)]
    return "unused" if any(name.startswith(f"{path}.") for path in paths) else "other"
