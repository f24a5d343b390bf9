"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a vision tower, a projector of two Linears, a language model.

MoE-LLaVA is a LLaVA with another language model, Pixtral-12B one with another tower. LLaVA-NeXT and LLaVA-OneVision
show the tower several crops of an image; what they do with the projected features (unpad, a token at the end of each
row) has no Linear in it.
"""

from transformers import PretrainedConfig

from qvlm_plugin.families.assembled import assembled
from qvlm_plugin.topology import Group, Stack, Topology

TWO_LINEARS = Stack("", (Group(("linear_1",)), Group(("linear_2",))))
ONE_LINEAR = Stack("", (Group(("linear_1",)),), kept=("linear_2",))
"""The linear projector of LLaVA before v1.5: its second Linear is a unit matrix (see `qvlm_plugin.models.original`)."""


def llava_topology(config: PretrainedConfig) -> Topology:
    """The topology of these models; raises as `assembled`."""
    return assembled(
        config,
        vision_path="model.vision_tower",
        projector_path="model.multi_modal_projector",
        projector=ONE_LINEAR if config.projector_hidden_act == "linear" else TWO_LINEARS,
    )
