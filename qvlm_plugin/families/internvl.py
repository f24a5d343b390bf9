"""InternVL in the Hugging Face layout (InternVL2.5, 3, 3.5): its own tower, a norm and two Linears, Qwen or Llama."""

from transformers import PretrainedConfig

from qvlm_plugin.families.decoders import decoder_of
from qvlm_plugin.families.towers import tower_of
from qvlm_plugin.topology import Group, Stack, Topology


def internvl_topology(config: PretrainedConfig) -> Topology:
    """The topology of these models; raises as `tower_of` and `decoder_of`."""
    return Topology(
        vision_path="model.vision_tower",
        vision=tower_of(config),
        projector_path="model.multi_modal_projector",
        projector=Stack("", (Group(("linear_1",), producer="layer_norm"), Group(("linear_2",)))),
        decoder_path="model.language_model",
        decoder=decoder_of(config),
    )
