"""InternVL in the Hugging Face layout (InternVL2.5, 3, 3.5): its own tower, a norm and two Linears, Qwen or Llama."""

from transformers import PretrainedConfig

from qvlm_plugin.families.assembled import assembled
from qvlm_plugin.topology import Group, Stack, Topology


def internvl_topology(config: PretrainedConfig) -> Topology:
    """The topology of these models; raises as `assembled`."""
    return assembled(
        config,
        vision_path="model.vision_tower",
        projector_path="model.multi_modal_projector",
        projector=Stack("", (Group(("linear_1",), producer="layer_norm"), Group(("linear_2",)))),
    )
