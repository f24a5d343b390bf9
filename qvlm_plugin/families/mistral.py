"""Mistral Small 3.1 and its successors: Pixtral's tower, a projector that joins patches, a Mistral."""

from transformers import PretrainedConfig

from qvlm_plugin.families.decoders import decoder_of
from qvlm_plugin.families.towers import tower_of
from qvlm_plugin.topology import Group, Stack, Topology


def mistral_topology(config: PretrainedConfig) -> Topology:
    """The topology of these models; raises as `tower_of` and `decoder_of`."""
    return Topology(
        vision_path="model.vision_tower",
        vision=tower_of(config),
        projector_path="model.multi_modal_projector",
        projector=Stack(
            "",
            (
                Group(("patch_merger.merging_layer",)),
                Group(("linear_1",), producer="patch_merger.merging_layer"),
                Group(("linear_2",)),
            ),
        ),
        decoder_path="model.language_model",
        decoder=decoder_of(config),
    )
