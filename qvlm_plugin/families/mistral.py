"""Mistral Small 3.1 and its successors: Pixtral's tower, a projector that joins patches, a Mistral."""

from transformers import PretrainedConfig

from qvlm_plugin.families.assembled import assembled
from qvlm_plugin.topology import Group, Stack, Topology


def mistral_topology(config: PretrainedConfig) -> Topology:
    """The topology of these models; raises as `assembled`."""
    return assembled(
        config,
        vision_path="model.vision_tower",
        projector_path="model.multi_modal_projector",
        projector=Stack(
            "",
            (
                Group(("patch_merger.merging_layer",)),
                Group(("linear_1",), producer="patch_merger.merging_layer"),
                Group(("linear_2",)),
            ),
        ),
    )
