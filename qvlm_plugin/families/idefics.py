"""Idefics3 and SmolVLM: a SigLIP tower, one Linear after a pixel shuffle, a Llama.

An image is shown as crops and as a whole.
"""

from transformers import PretrainedConfig

from qvlm_plugin.families.decoders import decoder_of
from qvlm_plugin.families.towers import tower_of
from qvlm_plugin.topology import Group, Stack, Topology


def idefics_topology(config: PretrainedConfig) -> Topology:
    """The topology of these models; raises as `tower_of` and `decoder_of`."""
    return Topology(
        vision_path="model.vision_model",
        vision=tower_of(config),
        projector_path="model.connector",
        projector=Stack("", (Group(("modality_projection.proj",)),)),
        decoder_path="model.text_model",
        decoder=decoder_of(config),
    )
