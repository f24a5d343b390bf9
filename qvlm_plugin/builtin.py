"""The methods, topologies and kernels that come with the package, provided through the same hooks as anyone's.

Methods are only described here. What they, topologies and kernels compute with is imported when it is asked for.
"""

from functools import partial
from typing import TYPE_CHECKING

from qvlm_plugin.hooks import hookimpl
from qvlm_plugin.methods.base import (
    Method,
    MethodOptions,
    imported,
    quantizes_activations,
    quantizes_anything,
)
from qvlm_plugin.methods.options import AWQOptions, NoOptions, QLoRAOptions, looks_at_data
from qvlm_plugin.methods.qvlm.options import JacobianOptions, QVLMOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qvlm_plugin.kernels.base import Kernel
    from qvlm_plugin.topology import Topology

_fit_qvlm = imported("qvlm_plugin.methods.qvlm.method:fit")

METHODS = (
    Method(
        name="none",
        summary="full precision",
        options=NoOptions,
        needs_calibration=lambda scheme, options: False,
        fit=imported("qvlm_plugin.methods.unquantized:fit"),
    ),
    Method(
        name="rtn",
        summary="round to nearest over the whole range of weights and calibrated activations",
        options=MethodOptions,
        needs_calibration=quantizes_activations,
        fit=imported("qvlm_plugin.methods.rtn:fit"),
    ),
    Method(
        name="qlora",
        summary="normal-float weights (QLoRA) and layer-wise l_p search of activation ranges",
        options=QLoRAOptions,
        needs_calibration=looks_at_data,
        fit=imported("qvlm_plugin.methods.qlora:fit"),
    ),
    Method(
        name="awq",
        summary="activation-aware weight scaling and clipping (AWQ) and layer-wise l_p search of activation ranges",
        options=AWQOptions,
        needs_calibration=quantizes_anything,
        fit=imported("qvlm_plugin.methods.awq:fit"),
    ),
    Method(
        name="qvlm",
        summary="Q-VLM: joint search of dependent layers and visual encoder optimization",
        options=QVLMOptions,
        needs_calibration=looks_at_data,
        fit=partial(_fit_qvlm, "qvlm"),
    ),
    Method(
        name="qvlm_jacobian",
        summary="Q-VLM with other defaults: errors weighed by Jacobians, trained norms, a wider grid of ratios",
        options=JacobianOptions,
        needs_calibration=looks_at_data,
        fit=partial(_fit_qvlm, "qvlm_jacobian"),
    ),
)
"""Full precision, the baselines, and Q-VLM with the paper's settings and with ours."""


@hookimpl
def qvlm_methods() -> list[Method]:
    """`METHODS`."""
    return list(METHODS)


@hookimpl(trylast=True)
def qvlm_topology(config: "PretrainedConfig") -> "Topology | None":
    """The LLaVA family; asked after other packages, so that they may describe a family better."""
    from qvlm_plugin.families.llava import llava_topology

    return llava_topology(config)


@hookimpl
def qvlm_kernels() -> "list[Kernel]":
    """Packed arithmetics in order of preference, and the reference."""
    from qvlm_plugin.kernels.int4 import INT4
    from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
    from qvlm_plugin.kernels.int8 import INT8
    from qvlm_plugin.kernels.nf4 import NF4
    from qvlm_plugin.kernels.reference import REFERENCE

    return [INT4, INT4_FOLDED, INT8, NF4, REFERENCE]
