"""``rtn``: round to nearest. Weights and activations take the whole range that they have, or had in calibration."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.methods.base import MethodOptions
from qvlm_plugin.methods.build import activation_sites, build_plan
from qvlm_plugin.methods.observe import visit_site_inputs
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.observers import ChannelStatistics
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import Site, Topology
from qvlm_plugin.workspace import Workspace


def observe_ranges(
    loaded: LoadedModel,
    sites: list[Site],
    calibration: CalibrationSet,
    batch_size: int,
    scales: Mapping[str, Tensor] | None = None,
    select: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, ChannelStatistics]:
    """Channel statistics of each site's input over the calibration set, by site name.

    ``scales`` divide the inputs; ``select`` chooses among the tokens [N, C] of a batch, at least one.
    """
    statistics: dict[str, ChannelStatistics] = {}

    def visit(site: Site, tokens: Tensor) -> None:
        seen = ChannelStatistics.of(tokens if select is None else select(tokens))
        statistics[site.name] = statistics[site.name].merge(seen) if site.name in statistics else seen

    if sites:
        visit_site_inputs(loaded, sites, calibration, batch_size, visit, "ranges", scales)
    return statistics


def fit(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: MethodOptions,
    workspace: Workspace,
) -> RoundingPlan:
    """Extremes of every static site in calibration; no clipping anywhere."""
    tensors = {}
    formats = activation_sites(topology, loaded, scheme)
    static = [site for site, fmt in formats if fmt.kind == "static_channel"]
    for name, statistics in observe_ranges(loaded, static, calibration, options.calibration_batch_size).items():
        tensors[f"{name}/lower"], tensors[f"{name}/upper"] = statistics.range()
    for site, fmt in formats:
        if fmt.kind == "dynamic_token":
            tensors[f"{site.name}/clip_ratio"] = torch.ones(1)
    return build_plan("rtn", loaded, topology, scheme, options, tensors, calibration)
