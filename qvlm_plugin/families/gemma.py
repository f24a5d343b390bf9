"""PaliGemma, PaliGemma 2 and Gemma 3: a SigLIP tower, a linear projection, a Gemma."""

from transformers import PretrainedConfig

from qvlm_plugin.families.assembled import assembled
from qvlm_plugin.topology import Group, Stack, Topology


def paligemma_topology(config: PretrainedConfig) -> Topology:
    """The topology of PaliGemma and PaliGemma 2; raises as `assembled`."""
    return assembled(
        config,
        vision_path="model.vision_tower",
        projector_path="model.multi_modal_projector",
        projector=Stack("", (Group(("linear",)),)),
    )


def gemma3_topology(config: PretrainedConfig) -> Topology:
    """The topology of Gemma 3; raises as `assembled`.

    Its projector multiplies by a Parameter, ``mm_input_projection_weight``, and has no Linear: it stays in the compute
    type.
    """
    return assembled(
        config,
        vision_path="model.vision_tower",
        projector_path="model.multi_modal_projector",
        projector=Stack("", ()),
    )
