"""How what a method finds becomes a plan: the formats of every Linear, and where to look for what they need."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.methods.base import MethodOptions
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_header import CalibrationRecord, Fold, ModulePlan, Rotation
from qvlm_plugin.scheme import UNQUANTIZED, BitWidths, Scheme
from qvlm_plugin.topology import Site, Topology, kept_linears, linear_layers, resolve

ACTIVATION_KINDS = {"vision": "dynamic_token", "projector": "dynamic_token", "decoder": "static_channel"}
"""Where activations vary most decides their quantizer (paper, section 4.3): across channels in the language model,
across tokens in the visual part, to which the projector's inputs belong."""


def activation_format(part: str, bits: int) -> ActivationFormat:
    """The activation format of a part at ``bits`` bits."""
    return ActivationFormat() if bits == UNQUANTIZED else ActivationFormat(kind=ACTIVATION_KINDS[part], bits=bits)


def weight_sites(topology: Topology, loaded: LoadedModel, scheme: Scheme) -> list[Site]:
    """The sites of Linears whose weights the scheme rounds."""
    sites = resolve(topology, loaded.model)
    return [site for site in sites if getattr(scheme, site.part).weight != UNQUANTIZED]


def activation_sites(topology: Topology, loaded: LoadedModel, scheme: Scheme) -> list[tuple[Site, ActivationFormat]]:
    """The sites whose activations the scheme rounds, with their formats."""
    sites = resolve(topology, loaded.model)
    formats = [(site, activation_format(site.part, getattr(scheme, site.part).activation)) for site in sites]
    return [(site, fmt) for site, fmt in formats if fmt.kind != "none"]


def build_plan(
    method: str,
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    options: MethodOptions,
    tensors: Mapping[str, Tensor],
    calibration: CalibrationSet | None,
    folds: Sequence[Fold] = (),
    replaced: Sequence[str] = (),
    rotations: Sequence[Rotation] = (),
    record: Mapping[str, Any] | None = None,
) -> RoundingPlan:
    """The plan that gives every Linear at a site the formats of its part, and leaves all others as they are.

    Weights with a ``<linear>/clip`` among the tensors are clipped by it, those with ``<linear>/codes`` are these codes
    (`quantizers.stored_parameters`); where there is a ``<site>/mean``, the bias of
    quantized weights is corrected. Experts that no calibration token reached have no bounds among the tensors: their
    inputs are rounded within each token's own extremes, which takes no data, and the plan's record lists them as
    ``uncalibrated``.
    """
    tensors, uncalibrated = dict(tensors), []
    site_of = {name: site for site in resolve(topology, loaded.model) for name in site.linears}
    kept = kept_linears(topology, loaded.model)
    modules = []
    for name, linear in linear_layers(loaded.model).items():
        site = site_of.get(name)
        widths = getattr(scheme, site.part) if site else BitWidths(UNQUANTIZED, UNQUANTIZED)
        part = site.part if site else "other" if name in kept else _part_of(name, topology)
        weight_format = options.weight_format(widths.weight)
        if f"{name}/clip" in tensors:
            weight_format = weight_format.model_copy(update={"clipped": True})
        if f"{name}/codes" in tensors:
            weight_format = WeightFormat.model_validate(weight_format.model_dump() | {"stored": True})
        if site and f"{site.name}/mean" in tensors and weight_format.kind != "none":
            weight_format = weight_format.model_copy(update={"corrected": True})
        activation = activation_format(part, widths.activation) if site else ActivationFormat()
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
                weight=weight_format,
                activation=activation,
            )
        )
    documents = None
    if calibration is not None:
        documents = CalibrationRecord(
            source=calibration.source, seed=calibration.seed, digests=calibration.digests(), conv=loaded.conv
        )
    return RoundingPlan(
        method=method,
        scheme=str(scheme),
        options=options.model_dump(),
        model=loaded.fingerprint,
        modules=tuple(modules),
        tensors=tensors,
        folds=tuple(folds),
        replaced=tuple(replaced),
        rotations=tuple(rotations),
        calibration=documents,
        record={**(record or {}), **({"uncalibrated": uncalibrated} if uncalibrated else {})},
    )


def _part_of(name: str, topology: Topology) -> str:
    """The part of a Linear without a site: ``unused`` in a part (blocks above the feature layer), else ``other``."""
    inside = any(name.startswith(getattr(topology, f"{part}_path") + ".") for part in ACTIVATION_KINDS)
    return "unused" if inside else "other"
