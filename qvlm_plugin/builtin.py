"""The methods, topologies and kernels that come with the package, provided through the same hooks as anyone's."""

from transformers import PretrainedConfig

from qvlm_plugin.families.llava import llava_topology
from qvlm_plugin.hooks import hookimpl
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.methods.awq import AWQ
from qvlm_plugin.methods.base import Method
from qvlm_plugin.methods.qlora import QLORA
from qvlm_plugin.methods.qvlm.method import QVLM, QVLM_JACOBIAN
from qvlm_plugin.methods.rtn import RTN
from qvlm_plugin.methods.unquantized import NONE
from qvlm_plugin.topology import Topology


@hookimpl
def qvlm_methods() -> list[Method]:
    """Full precision, the baselines, and Q-VLM with the paper's settings and with ours."""
    return [NONE, RTN, QLORA, AWQ, QVLM, QVLM_JACOBIAN]


@hookimpl(trylast=True)
def qvlm_topology(config: PretrainedConfig) -> Topology | None:
    """The LLaVA family; asked after other packages, so that they may describe a family better."""
    return llava_topology(config)


@hookimpl
def qvlm_kernels() -> list[Kernel]:
    """Packed arithmetics in order of preference, and the reference."""
    return [INT4, INT4_FOLDED, INT8, NF4, REFERENCE]
