"""``qlora``: normal-float weights and layer-wise searched activation ranges - the paper's strongest baseline.

Weights are QLoRA's: a normal-float codebook, blocks of 64, doubly quantized scales. Activation ranges are searched site
by site, minimising the l_p distance between full-precision and rounded activations (Eq. 2 with the initialisation of
section 4.1): a grid of ratios pulls the observed bounds in.
"""

from collections.abc import Mapping

from torch import Tensor

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.methods.build import activation_sites, build_plan, weight_sites
from qvlm_plugin.methods.means import mean_inputs
from qvlm_plugin.methods.observe import visit_site_inputs
from qvlm_plugin.methods.options import QLoRAOptions, RangeSearchOptions
from qvlm_plugin.methods.rtn import observe_ranges
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.observers import ChannelStatistics, best_ratio, channel_lp_losses, token_lp_losses
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import Site, Topology
from qvlm_plugin.workspace import Workspace


def observe_means(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: RangeSearchOptions,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What correcting the biases takes, as plan tensors; nothing without ``bias_correction``."""
    sites = weight_sites(topology, loaded, scheme) if options.bias_correction else []
    return mean_inputs(loaded, sites, calibration, options.calibration_batch_size, scales) if sites else {}


def search_ranges(
    loaded: LoadedModel,
    formats: list[tuple[Site, ActivationFormat]],
    calibration: CalibrationSet,
    options: RangeSearchOptions,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The plan tensors of every site, each ratio chosen by its own l_p distance; ties keep the wider range.

    Inputs of the sites named in ``scales`` are divided by these [C] first, as in the model with the scales folded.
    """
    format_of = dict(formats)
    static = [site for site, fmt in formats if fmt.kind == "static_channel"]
    statistics = observe_ranges(loaded, static, calibration, options.calibration_batch_size, scales)
    losses: dict[Site, Tensor] = {}

    def visit(site: Site, tokens: Tensor) -> None:
        new = _losses(site, tokens, format_of[site], statistics, options)
        losses[site] = losses[site] + new if site in losses else new

    visit_site_inputs(
        loaded, list(format_of), calibration, options.calibration_batch_size, visit, "range search", scales
    )
    tensors = {}
    for site, fmt in formats:
        if site not in losses:  # of an expert that no calibration token reached
            continue
        ratio = best_ratio(losses[site], options.ratios)
        if fmt.kind == "static_channel":
            tensors[f"{site.name}/lower"], tensors[f"{site.name}/upper"] = statistics[site.name].range(ratio)
        else:
            tensors[f"{site.name}/clip_ratio"] = ratio.view(1).cpu()
    return tensors


def _losses(
    site: Site,
    tokens: Tensor,
    fmt: ActivationFormat,
    statistics: dict[str, ChannelStatistics],
    options: RangeSearchOptions,
) -> Tensor:
    if fmt.kind == "static_channel":
        losses = channel_lp_losses(tokens, statistics[site.name], options.ratios, fmt.bits, options.norm)
        return losses if options.ranges == "channel" else losses.sum(dim=1)
    return token_lp_losses(tokens, options.ratios, fmt.bits, options.norm)


def fit(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: QLoRAOptions,
    workspace: Workspace,
) -> RoundingPlan:
    """Search the range of every quantized site; weights need no fit."""
    formats = activation_sites(topology, loaded, scheme)
    tensors = search_ranges(loaded, formats, calibration, options) if formats else {}
    tensors |= observe_means(loaded, topology, scheme, calibration, options)
    return build_plan("qlora", loaded, topology, scheme, options, tensors, calibration)
