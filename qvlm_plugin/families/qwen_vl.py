"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the tower sees images in their own size, and the projector joins patches.

The tower's hidden states are [patches of all images, C]. Qwen3-VL has more projectors, which read features of lower
blocks; what they write is added to the hidden states between the first decoder layers (DeepStack).
"""

from transformers import PretrainedConfig

from qvlm_plugin.families.assembled import assembled
from qvlm_plugin.topology import Group, Stack, Topology


def qwen2_topology(config: PretrainedConfig) -> Topology:
    """The topology of Qwen2-VL and Qwen2.5-VL; raises as `assembled`."""
    return assembled(
        config,
        vision_path="model.visual",
        projector_path="model.visual.merger",
        projector=Stack("", (Group(("mlp.0",)), Group(("mlp.2",)))),
    )


def qwen3_topology(config: PretrainedConfig) -> Topology:
    """The topology of Qwen3-VL; raises as `assembled`."""
    return assembled(
        config,
        vision_path="model.visual",
        projector_path=("model.visual.merger", "model.visual.deepstack_merger_list"),
        projector=Stack("", (Group(("linear_fc1",)), Group(("linear_fc2",)))),
    )
