"""PaliGemma, PaliGemma 2 and Gemma 3: a SigLIP tower, a linear projection, a Gemma."""

from transformers import PretrainedConfig

from qvlm_plugin.families.decoders import decoder_of
from qvlm_plugin.families.towers import tower_of
from qvlm_plugin.topology import Group, Stack, Topology


def paligemma_topology(config: PretrainedConfig) -> Topology:
    """The topology of PaliGemma and PaliGemma 2; raises as `tower_of` and `decoder_of`."""
    return Topology(
        vision_path="model.vision_tower",
        vision=tower_of(config),
        projector_path="model.multi_modal_projector",
        projector=Stack("", (Group(("linear",)),)),
        decoder_path="model.language_model",
        decoder=decoder_of(config),
    )


def gemma3_topology(config: PretrainedConfig) -> Topology:
    """The topology of Gemma 3; raises as `tower_of` and `decoder_of`.

    Its projector multiplies by a Parameter, ``mm_input_projection_weight``, and has no Linear: it stays in the compute
    type.
    """
    return Topology(
        vision_path="model.vision_tower",
        vision=tower_of(config),
        projector_path="model.multi_modal_projector",
        projector=Stack("", ()),
        decoder_path="model.language_model",
        decoder=decoder_of(config),
    )
