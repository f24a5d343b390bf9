"""The description of each ``config.model_type``."""

from transformers import PretrainedConfig

from qvlm_plugin.families.gemma import gemma3_topology, paligemma_topology
from qvlm_plugin.families.idefics import idefics_topology
from qvlm_plugin.families.internvl import internvl_topology
from qvlm_plugin.families.llava import llava_topology
from qvlm_plugin.families.mistral import mistral_topology
from qvlm_plugin.families.qwen_vl import qwen2_topology, qwen3_topology
from qvlm_plugin.topology import Topology

DESCRIBED = {
    "gemma3": gemma3_topology,
    "idefics3": idefics_topology,
    "internvl": internvl_topology,
    "llava": llava_topology,
    "llava_next": llava_topology,
    "llava_onevision": llava_topology,
    "mistral3": mistral_topology,
    "paligemma": paligemma_topology,
    "qwen2_5_vl": qwen2_topology,
    "qwen2_vl": qwen2_topology,
    "qwen3_vl": qwen3_topology,
    "smolvlm": idefics_topology,
}


def described_topology(config: PretrainedConfig) -> Topology | None:
    """The topology of a model of these families; None for others.

    Raises:
        QVLMError: the tower or the language model of such a model is not one of those described.
    """
    describe = DESCRIBED.get(config.model_type)
    return describe and describe(config)
