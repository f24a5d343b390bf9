"""Idefics3 and SmolVLM: a SigLIP tower, one Linear after a pixel shuffle, a Llama.

An image is shown as crops and as a whole.
"""

from transformers import PretrainedConfig

from qvlm_plugin.families.assembled import assembled
from qvlm_plugin.topology import Group, Stack, Topology


def idefics_topology(config: PretrainedConfig) -> Topology:
    """The topology of these models; raises as `assembled`."""
    return assembled(
        config,
        vision_path="model.vision_model",
        projector_path="model.connector",
        projector=Stack("", (Group(("modality_projection.proj",)),)),
        decoder_path="model.text_model",
    )
