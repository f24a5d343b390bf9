"""The memory that a run of a grid needs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from qvlm_plugin.calibration import parse_sources
from qvlm_plugin.doctor.needs import Skeleton, search_peaks, weight_needs
from qvlm_plugin.doctor.space import HEADROOM
from qvlm_plugin.methods.peak import Setting
from qvlm_plugin.models.placement import default_device
from qvlm_plugin.plan_request import PlanRequest

TOKENS = 600
"""Assumed tokens of the longest calibration sample, which is unknown before samples are read."""


@dataclass(frozen=True)
class Memory:
    """Maximum bytes.

    Attributes:
        evaluation: the weights times `HEADROOM`.
        search: the peak of the plan's search; 0 without a search.
    """

    evaluation: float
    search: float


def opening_of(arguments: Mapping[str, str]) -> dict[str, str]:
    """The model's arguments that `open_skeleton` takes."""
    return {name: arguments[name] for name in ("pretrained", "revision", "topology") if name in arguments}


def run_memory(skeleton: Skeleton, arguments: Mapping[str, str], request: PlanRequest) -> Memory:
    """The memory of a run on the model's device.

    Args:
        skeleton: the model, opened by `opening_of` its arguments.
        arguments: the model's arguments by name.
        request: the plan to search for it.
    """
    element = _element(skeleton.config, arguments.get("dtype", "auto"))
    needs = weight_needs(skeleton, request.scheme)
    packed = arguments.get("backend", "reference") != "reference" and request.method.name != "none"
    weights = needs.packed if packed else needs.full * element / 2
    search = 0.0
    if request.needs_calibration:
        samples = sum(source.count for source in parse_sources(arguments["calibration"]))
        setting = Setting(samples, TOKENS, element=element, accelerator=default_device().type != "cpu")
        search = float(max((peak.bytes for peak in search_peaks(skeleton, request, setting)), default=0))
    return Memory(weights * HEADROOM, search)


def _element(config: PretrainedConfig, dtype: str) -> int:
    """Bytes of an element in the compute type."""
    kind = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype, None)
    return kind.itemsize if isinstance(kind, torch.dtype) else 2
