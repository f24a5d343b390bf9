"""The memory that a run of a grid takes, computed from the shapes of the model; no weight is loaded for it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from qvlm_plugin import plugins
from qvlm_plugin.calibration import parse_sources
from qvlm_plugin.demo import resolve_demo
from qvlm_plugin.doctor.space import HEADROOM, needs_of
from qvlm_plugin.methods.peak import Setting, Shapes, peaks
from qvlm_plugin.models.placement import default_device, empty_model
from qvlm_plugin.plan_request import PlanRequest
from qvlm_plugin.tracing.trace import open_with_topology

TOKENS = 600
"""Tokens of the longest calibration sample, which nobody knows before it is read."""


@dataclass(frozen=True)
class Memory:
    """Bytes at most.

    Attributes:
        evaluation: of the weights and what runs beside them, by `HEADROOM`.
        search: of finding the plan, by `methods.peak`; 0 where there is nothing to find.
    """

    evaluation: float
    search: float


def run_memory(arguments: Mapping[str, str], request: PlanRequest) -> Memory:
    """What a run takes where the model runs.

    Args:
        arguments: of the model, by name.
        request: what is searched for it.

    Raises:
        QVLMError: see `open_with_topology`.
    """
    named = {name: arguments[name] for name in ("revision", "topology") if name in arguments}
    checkpoint = open_with_topology(resolve_demo(arguments["pretrained"]), **named)
    element = _element(checkpoint.config, arguments.get("dtype", "auto"))
    needs = needs_of(checkpoint, request.scheme)
    packed = arguments.get("backend", "reference") != "reference" and request.method.name != "none"
    weights = needs.packed if packed else needs.full * element / 2
    search = 0.0
    if request.needs_calibration:
        samples = sum(one.count for one in parse_sources(arguments["calibration"]))
        where = default_device().type != "cpu"
        setting = Setting(samples, TOKENS, element=element, accelerator=where)
        shapes = Shapes.of(empty_model(checkpoint.config), plugins.topology_of(checkpoint))
        found = peaks(shapes, request.method, request.scheme, request.options, setting)
        search = float(max((peak.bytes for peak in found), default=0))
    return Memory(weights * HEADROOM, search)


def _element(config: PretrainedConfig, dtype: str) -> int:
    """Bytes of an element in the compute type."""
    kind = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype, None)
    return kind.itemsize if isinstance(kind, torch.dtype) else 2
