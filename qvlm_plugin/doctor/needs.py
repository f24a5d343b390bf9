"""The memory that a checkpoint needs, computed from its small files; no weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from qvlm_plugin import plugins
from qvlm_plugin.demo import resolve_demo
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.peak import Peak, Setting, Shapes, peaks
from qvlm_plugin.models.placement import empty_model
from qvlm_plugin.plan_request import PlanRequest
from qvlm_plugin.scheme import UNQUANTIZED, Scheme
from qvlm_plugin.topology import Topology, resolve
from qvlm_plugin.tracing.trace import open_with_topology


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint's model without its weights."""

    config: PretrainedConfig
    topology: Topology
    model: PreTrainedModel


@dataclass(frozen=True)
class Needs:
    """Bytes of a model's weights.

    Attributes:
        full: bytes in 16 bits, as for a search and ``backend=reference``.
        packed: bytes with ``backend=packed``.
    """

    full: float
    packed: float


def open_skeleton(opening: Mapping[str, Any]) -> Skeleton:
    """The model of a checkpoint folder, a hub id or ``demo``, without its weights.

    Args:
        opening: ``pretrained``, and further arguments of `open_with_topology`.

    Raises:
        QVLMError: the checkpoint cannot be read, its family is not supported, or its prompts do not fit the model.
    """
    checkpoint = open_with_topology(**{**opening, "pretrained": resolve_demo(opening["pretrained"])})
    return Skeleton(checkpoint.config, plugins.topology_of(checkpoint), empty_model(checkpoint.config))


def weight_needs(skeleton: Skeleton, scheme: Scheme) -> Needs:
    """The size of a model's weights under a scheme."""
    full = sum(parameter.numel() for parameter in skeleton.model.parameters()) * 2
    packed, options = full, MethodOptions()
    for site in resolve(skeleton.topology, skeleton.model):
        bits = getattr(scheme, site.part).weight
        if bits != UNQUANTIZED:
            stored = options.weight_format(4 if bits <= 4 else 8)  # packed kernels have 4 and 8 bits only
            for name in site.linears:
                weight = skeleton.model.get_submodule(name).weight
                packed -= weight.numel() * (UNQUANTIZED - stored.effective_bits(tuple(weight.shape))) / 8
    return Needs(full, packed)


def search_peaks(skeleton: Skeleton, request: PlanRequest, setting: Setting) -> list[Peak]:
    """The peak memory of each step of a search; empty if the method needs no search."""
    shapes = Shapes.of(skeleton.model, skeleton.topology)
    return peaks(shapes, request.method, request.scheme, request.options, setting)
