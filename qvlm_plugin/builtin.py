"""The methods, topologies and kernels that come with the package, provided through the same hooks as any plugin's.

Methods are only described here. The code of their steps, of topologies and of kernels is imported when it is needed.
"""

from typing import TYPE_CHECKING

from qvlm_plugin.hooks import hookimpl
from qvlm_plugin.methods.base import Method, preset
from qvlm_plugin.methods.options import MethodOptions, NoOptions
from qvlm_plugin.methods.steps import STEPS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qvlm_plugin.kernels.base import Kernel
    from qvlm_plugin.topology import Topology

METHODS = (
    Method("none", "full precision", NoOptions, steps=()),
    Method("rtn", "round to nearest over the whole range of weights and calibrated activations", MethodOptions, STEPS),
    Method(
        "qlora",
        "normal-float weights (QLoRA) and an l_p search of activation ranges",
        preset(MethodOptions, weights="nf", observer="lp"),
        STEPS,
    ),
    Method(
        "awq",
        "activation-aware weight scaling and clipping (AWQ) and an l_p search of activation ranges",
        preset(MethodOptions, transform="awq", observer="lp"),
        STEPS,
    ),
    Method(
        "qvlm",
        "Q-VLM: joint search of dependent layers and visual encoder optimization",
        preset(MethodOptions, weights="nf", observer="lp", cdm=True, veo=True),
        STEPS,
    ),
    Method(
        "qvlm_jacobian",
        "Q-VLM with other defaults: errors weighted by Jacobians, trained norms, a wider grid of ratios",
        preset(
            MethodOptions,
            weights="nf",
            observer="lp",
            importance="jacobian",
            min_ratio=0.3,
            ratio_step=0.1,
            bias_correction=True,
            beam=2,
            veo=True,
            veo_train="clip+norm",
            veo_epochs=3,
        ),
        STEPS,
    ),
    Method(
        "qvlm_rotated",
        "Q-VLM on smoothed and rotated inputs, rounded per token, with GPTQ",
        preset(
            MethodOptions,
            transform="smooth+rotate",
            smooth_by="rms",
            activations="token",
            token_bounds="normal",
            group_size=64,
            group_scales="progressive",
            weight_clip="mse",
            rounding="gptq",
            cdm=True,
            min_percentile=0.9,
            max_percentile=1.1,
            percentile_step=0.1,
            relative_error=True,
            beam=2,
        ),
        STEPS,
    ),
    Method(
        "mbq",
        "AWQ with errors at image and text tokens weighted by their gradients (MBQ), activations per token",
        preset(MethodOptions, transform="awq", importance="modality", activations="token"),
        STEPS,
    ),
    Method(
        "smoothquant",
        "magnitudes moved from activations into weights (SmoothQuant), activations rounded per token",
        preset(MethodOptions, transform="smooth", group_size=-1, symmetric=True, activations="token"),
        STEPS,
    ),
    Method(
        "gptq",
        "weights rounded column by column, each column compensating the errors before it (GPTQ), activations per token",
        preset(MethodOptions, rounding="gptq", activations="token"),
        STEPS,
    ),
    Method(
        "quarot",
        "rotated inputs rounded per token, GPTQ (QuaRot)",
        preset(
            MethodOptions,
            transform="rotate",
            activations="token",
            rounding="gptq",
            weight_clip="mse",
            group_size=-1,
            symmetric=True,
        ),
        STEPS,
    ),
)
"""Full precision, the baselines, Q-VLM (Wang et al., NeurIPS 2024; here with normal-float weights), and ours.

``cdm=false`` and ``veo=false`` each leave out one part of ``qvlm``; both together give `qlora`, the baseline: the
rows of the paper's Table 1. ``qvlm_jacobian`` deviates from the paper: errors are weighted by Jacobians, the grid of
ratios is wider, biases are corrected, and the tower's norms are trained, too. It leaves the joint search out,
which shows no gain where each channel has its own range. ``qvlm_rotated`` does not train clip ratios
(``veo``): on the demo model they lower the loss, but three draws show no gain in accuracy. Nor do they show one of its
joint search, which it keeps so that the preset has Q-VLM's main step; ``cdm=false`` leaves it out.
"""


@hookimpl
def qvlm_methods() -> list[Method]:
    """The methods in `METHODS`."""
    return list(METHODS)


@hookimpl(trylast=True)
def qvlm_topology(config: "PretrainedConfig") -> "Topology | None":
    """The families that come with the package; called last, so that other packages can override a description."""
    from qvlm_plugin.families.described import described_topology

    return described_topology(config)


@hookimpl
def qvlm_kernels() -> "list[Kernel]":
    """Packed kernels in order of preference, and the reference."""
    from qvlm_plugin.kernels.int4 import INT4
    from qvlm_plugin.kernels.int4_codes import INT4_CODES
    from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
    from qvlm_plugin.kernels.int8 import INT8
    from qvlm_plugin.kernels.nf4 import NF4
    from qvlm_plugin.kernels.reference import REFERENCE

    return [INT4_CODES, INT4, INT4_FOLDED, INT8, NF4, REFERENCE]
